#include "plan/pointwise.h"

extern "C" {

int64_t gqa_swiglu_rows(const gqa_swiglu_params *p) { return gqa::cpu_spans(*p); }

gqa_status gqa_swiglu_plan(const gqa_swiglu_params *p, const gqa_device *, gqa_plan *plan) {
  GQA_RETURN_IF_ERROR(gqa::check_pointwise(p));
  return gqa::plan_pointwise("swiglu", gqa::flattened(*p), plan);
}

}  // extern "C"
