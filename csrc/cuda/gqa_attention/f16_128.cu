// Instances of attend for float16 and head_dim up to 128.
#include "cuda/gqa_attention/instance.cuh"

GQA_ATTEND_INSTANCE(__half, 2);
GQA_ATTEND_INSTANCE(__half, 6);
GQA_ATTEND_INSTANCE(__half, 10);
