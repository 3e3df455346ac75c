// Instances of attend for bfloat16 and head_dim up to 96.
#include "cuda/gqa_attention/instance.cuh"

GQA_ATTEND_INSTANCE(__nv_bfloat16, 1);
GQA_ATTEND_INSTANCE(__nv_bfloat16, 5);
GQA_ATTEND_INSTANCE(__nv_bfloat16, 9);
