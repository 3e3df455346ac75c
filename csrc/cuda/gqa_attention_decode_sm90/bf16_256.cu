// Instances of decode_ring for bfloat16 and head_dim 256.
#include "cuda/gqa_attention_decode_sm90/dispatch.h"
#include "cuda/gqa_attention_decode_sm90/launch.cuh"

GQA_DECODE_INSTANCE(__nv_bfloat16, 2, 256, bf16_256)
