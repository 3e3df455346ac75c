// The CUDA entries of a library built without nvcc.
#include "gqa_kernels.h"

#define GQA_STUB(op, params) \
  gqa_status gqa_##op##_cuda(const params *, CUstream_st *) { return GQA_STATUS_NOT_BUILT; }

extern "C" {
GQA_STUB(rmsnorm, gqa_rmsnorm_params)
GQA_STUB(add_rmsnorm, gqa_add_rmsnorm_params)
GQA_STUB(residual_add, gqa_residual_add_params)
GQA_STUB(swiglu, gqa_swiglu_params)
GQA_STUB(swiglu_ffn, gqa_swiglu_ffn_params)
GQA_STUB(linear, gqa_linear_params)
GQA_STUB(rope, gqa_rope_params)
GQA_STUB(qk_rmsnorm_rope, gqa_qk_rmsnorm_rope_params)
GQA_STUB(kv_cache_append, gqa_kv_cache_append_params)
GQA_STUB(attention_prefill, gqa_attention_prefill_params)
GQA_STUB(attention_decode, gqa_attention_decode_params)
GQA_STUB(merge_attention_states, gqa_merge_attention_states_params)
GQA_STUB(sample, gqa_sample_params)
GQA_STUB(decoder_step, gqa_decoder_step_params)

gqa_status gqa_current_device(gqa_device *) { return GQA_STATUS_NOT_BUILT; }
const char *gqa_cuda_archs(void) { return ""; }
}
