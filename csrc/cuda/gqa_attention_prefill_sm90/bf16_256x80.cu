// The instance of prefill_wgmma for bfloat16, head_dim 256 and blocks of 80 keys.
#include "cuda/gqa_attention_prefill_sm90/launch.cuh"

GQA_PREFILL_INSTANCE(__nv_bfloat16, 5, bf16_256x80)
