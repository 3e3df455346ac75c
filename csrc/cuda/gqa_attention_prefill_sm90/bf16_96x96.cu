// The instance of prefill_wgmma for bfloat16, head_dim 96 and blocks of 96 keys.
#include "cuda/gqa_attention_prefill_sm90/launch.cuh"

GQA_PREFILL_INSTANCE(__nv_bfloat16, 2, bf16_96x96)
