// The instance of prefill_wgmma for bfloat16 and head_dim 128, 176 keys at once.
#include "cuda/gqa_attention_prefill_sm90/launch.cuh"

GQA_PREFILL_INSTANCE(__nv_bfloat16, 2, bf16_128x176)
