// The instance of prefill_wgmma for float16, head_dim 96 and blocks of 96 keys.
#include "cuda/gqa_attention_prefill_sm90/launch.cuh"

GQA_PREFILL_INSTANCE(__half, 2, f16_96x96)
