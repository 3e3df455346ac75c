// Instances of decode_ring for bfloat16 and head_dim 96.
#include "cuda/gqa_attention_decode_sm90/dispatch.h"
#include "cuda/gqa_attention_decode_sm90/launch.cuh"

GQA_DECODE_INSTANCE(__nv_bfloat16, 2, 96, bf16_96)
