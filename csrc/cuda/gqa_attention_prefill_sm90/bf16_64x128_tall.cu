// The instance of prefill_wgmma for bfloat16, head_dim 64 and blocks of 128 keys, with 192 rows.
#include "cuda/gqa_attention_prefill_sm90/launch.cuh"

GQA_PREFILL_INSTANCE(__nv_bfloat16, 1, bf16_64x128_tall)
