// Instances of decode_ring for float16, head_dim 64 and quantised caches.
#include "cuda/gqa_attention_decode_sm90/dispatch.h"
#include "cuda/gqa_attention_decode_sm90/launch.cuh"

GQA_DECODE_INSTANCE(__half, 1, 64, f16_64_quantized)
