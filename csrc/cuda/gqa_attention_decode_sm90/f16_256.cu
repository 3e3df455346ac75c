// Instances of decode_ring for float16 and head_dim 256.
#include "cuda/gqa_attention_decode_sm90/dispatch.h"
#include "cuda/gqa_attention_decode_sm90/launch.cuh"

GQA_DECODE_INSTANCE(__half, 2, 256, f16_256)
