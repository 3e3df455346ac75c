#include "plan/sample.h"

#include "common/sampling.h"
#include "plan/plan.h"

namespace gqa {
namespace {

bool is_readable(const gqa_index &index) {
  return index.data == nullptr || index.dtype == GQA_DTYPE_INT32 || index.dtype == GQA_DTYPE_INT64;
}

}  // namespace

gqa_status check_params(const gqa_sample_params *p) {
  GQA_RETURN_IF_ERROR(check_struct(p));
  if (!is_float_dtype(p->dtype)) return GQA_STATUS_UNSUPPORTED;
  if (!is_readable(p->top_ks) || !is_readable(p->seeds) || !is_readable(p->offsets)) return GQA_STATUS_UNSUPPORTED;
  if (p->rows < 0 || p->vocab < 1) return GQA_STATUS_INVALID_ARGUMENT;
  if (p->vocab > sampling::kMaxVocab) return GQA_STATUS_UNSUPPORTED;
  if (p->rows == 0) return GQA_STATUS_OK;
  return p->logits != nullptr && p->ids != nullptr ? GQA_STATUS_OK : GQA_STATUS_NULL_POINTER;
}

}  // namespace gqa

extern "C" {

int64_t gqa_sample_rows(const gqa_sample_params *p) { return p->rows; }

gqa_status gqa_sample_plan(const gqa_sample_params *p, const gqa_device *, gqa_plan *plan) {
  GQA_RETURN_IF_ERROR(gqa::check_params(p));
  *plan = {};
  if (p->rows > INT32_MAX) return GQA_STATUS_UNSUPPORTED;
  if (p->rows == 0) return GQA_STATUS_OK;
  const int64_t shared_memory = (gqa::sampling::kBins + 1) * gqa::kSampleColumns * sizeof(uint32_t);
  gqa::add_launch(plan,
                  gqa::make_launch("sample", "sample_row", p->dtype, {p->rows}, {gqa::kSampleThreads}, shared_memory));
  plan->reason = "one block per row serves every vocabulary and setting";
  return GQA_STATUS_OK;
}

}  // extern "C"
