// The instance of prefill_wgmma for float16, head_dim 64 and blocks of 128 keys, with 128 rows.
#include "cuda/gqa_attention_prefill_sm90/launch.cuh"

GQA_PREFILL_INSTANCE(__half, 0, f16_64x128)
