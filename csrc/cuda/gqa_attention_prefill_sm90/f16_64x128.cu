// The instance of prefill_wgmma for float16 and head_dim 64, 128 keys at once.
#include "cuda/gqa_attention_prefill_sm90/launch.cuh"

GQA_PREFILL_INSTANCE(__half, 0, f16_64x128)
