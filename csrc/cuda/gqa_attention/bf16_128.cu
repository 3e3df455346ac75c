// Instances of attend for bfloat16 and head_dim up to 128.
#include "cuda/gqa_attention/instance.cuh"

GQA_ATTEND_INSTANCE(__nv_bfloat16, 2);
GQA_ATTEND_INSTANCE(__nv_bfloat16, 6);
GQA_ATTEND_INSTANCE(__nv_bfloat16, 10);
