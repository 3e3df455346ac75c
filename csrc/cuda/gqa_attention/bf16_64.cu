// Instances of attend for bfloat16 and head_dim up to 64.
#include "cuda/gqa_attention/instance.cuh"

GQA_ATTEND_INSTANCE(__nv_bfloat16, 0);
GQA_ATTEND_INSTANCE(__nv_bfloat16, 4);
GQA_ATTEND_INSTANCE(__nv_bfloat16, 8);
