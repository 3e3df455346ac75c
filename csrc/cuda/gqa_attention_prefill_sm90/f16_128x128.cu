// The instance of prefill_wgmma for float16 and head_dim 128, 128 keys at once.
#include "cuda/gqa_attention_prefill_sm90/launch.cuh"

GQA_PREFILL_INSTANCE(__half, 1, f16_128x128)
