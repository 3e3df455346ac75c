#include "plan/pointwise.h"

extern "C" {

int64_t gqa_residual_add_rows(const gqa_residual_add_params *p) { return gqa::cpu_spans(*p); }

gqa_status gqa_residual_add_plan(const gqa_residual_add_params *p, const gqa_device *, gqa_plan *plan) {
  GQA_RETURN_IF_ERROR(gqa::check_pointwise(p));
  return gqa::plan_pointwise("residual_add", gqa::flattened(*p), plan);
}

}  // extern "C"
