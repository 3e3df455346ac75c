// Instances of attend for float16 and head_dim up to 64.
#include "cuda/gqa_attention/instance.cuh"

GQA_ATTEND_INSTANCE(__half, 0);
GQA_ATTEND_INSTANCE(__half, 4);
GQA_ATTEND_INSTANCE(__half, 8);
