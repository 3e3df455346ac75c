// The instance of prefill_wgmma for bfloat16, head_dim 128 and blocks of 160 keys.
#include "cuda/gqa_attention_prefill_sm90/launch.cuh"

GQA_PREFILL_INSTANCE(__nv_bfloat16, 4, bf16_128x160)
