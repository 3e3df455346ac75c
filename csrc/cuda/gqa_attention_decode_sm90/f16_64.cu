// Instances of decode_ring for float16 and head_dim 64.
#include "cuda/gqa_attention_decode_sm90/dispatch.h"
#include "cuda/gqa_attention_decode_sm90/launch.cuh"

GQA_DECODE_INSTANCE(__half, 2, 64, f16_64)
