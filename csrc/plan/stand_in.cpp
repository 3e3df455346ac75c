#include "plan/plan.h"
extern "C" {
gqa_status gqa_attention_prefill_plan(const gqa_attention_prefill_params *, const gqa_device *, gqa_plan *) {
  return GQA_STATUS_UNSUPPORTED;
}
gqa_status gqa_attention_decode_plan(const gqa_attention_decode_params *, const gqa_device *, gqa_plan *) {
  return GQA_STATUS_UNSUPPORTED;
}
int64_t gqa_attention_prefill_workspace_size(const gqa_attention_prefill_params *, const gqa_device *) { return 0; }
int64_t gqa_attention_decode_workspace_size(const gqa_attention_decode_params *, const gqa_device *) { return 0; }
}
