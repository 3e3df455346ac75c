// Instances of decode_ring for bfloat16, head_dim 96 and quantised caches.
#include "cuda/gqa_attention_decode_sm90/dispatch.h"
#include "cuda/gqa_attention_decode_sm90/launch.cuh"

GQA_DECODE_INSTANCE(__nv_bfloat16, 1, 96, bf16_96_quantized)
