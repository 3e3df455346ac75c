// Instances of attend for float16 and head_dim up to 96.
#include "cuda/gqa_attention/instance.cuh"

GQA_ATTEND_INSTANCE(__half, 1);
GQA_ATTEND_INSTANCE(__half, 5);
GQA_ATTEND_INSTANCE(__half, 9);
