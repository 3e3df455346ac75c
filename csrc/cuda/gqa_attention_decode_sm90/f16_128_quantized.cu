// Instances of decode_ring for float16, head_dim 128 and quantised caches.
#include "cuda/gqa_attention_decode_sm90/dispatch.h"
#include "cuda/gqa_attention_decode_sm90/launch.cuh"

GQA_DECODE_INSTANCE(__half, 1, 128, f16_128_quantized)
