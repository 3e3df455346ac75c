#include "plan/merge_attention_states.h"

#include "plan/plan.h"

namespace gqa {
namespace {

constexpr int64_t kRowsPerBlock = 4;  // one warp each

int64_t count_rows(const gqa_merge_attention_states_params *p) { return p->batch * p->seqlen_q * p->num_q_heads; }

}  // namespace

gqa_status check_params(const gqa_merge_attention_states_params *p) {
  GQA_RETURN_IF_ERROR(check_struct(p));
  if (!is_float_dtype(p->dtype)) return GQA_STATUS_UNSUPPORTED;
  if (p->parts < 0 || p->num_q_heads < 1 || p->head_dim < 1 || p->batch < 0 || p->seqlen_q < 0) {
    return GQA_STATUS_INVALID_ARGUMENT;
  }
  if (count_rows(p) == 0) return GQA_STATUS_OK;
  const bool inputs = p->parts == 0 || (p->outs != nullptr && p->lses != nullptr);
  return inputs && p->out != nullptr && p->lse != nullptr ? GQA_STATUS_OK : GQA_STATUS_NULL_POINTER;
}

}  // namespace gqa

extern "C" {

int64_t gqa_merge_attention_states_rows(const gqa_merge_attention_states_params *p) { return gqa::count_rows(p); }

gqa_status gqa_merge_attention_states_plan(const gqa_merge_attention_states_params *p, const gqa_device *,
                                           gqa_plan *plan) {
  GQA_RETURN_IF_ERROR(gqa::check_params(p));
  *plan = {};
  const int64_t blocks = gqa::ceil_div(gqa::count_rows(p), gqa::kRowsPerBlock);
  if (blocks > INT32_MAX) return GQA_STATUS_UNSUPPORTED;
  if (blocks == 0) return GQA_STATUS_OK;
  gqa::add_launch(
      plan, gqa::make_launch("merge_attention_states", "merge_rows", p->dtype, {blocks}, {32 * gqa::kRowsPerBlock}));
  plan->reason = "one warp per row serves every width";
  return GQA_STATUS_OK;
}

}  // extern "C"
