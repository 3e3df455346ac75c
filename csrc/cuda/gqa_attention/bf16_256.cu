// Instances of attend for bfloat16 and head_dim up to 256.
#include "cuda/gqa_attention/instance.cuh"

GQA_ATTEND_INSTANCE(__nv_bfloat16, 3);
GQA_ATTEND_INSTANCE(__nv_bfloat16, 7);
