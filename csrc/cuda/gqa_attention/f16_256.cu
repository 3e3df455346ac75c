// Instances of attend for float16 and head_dim up to 256.
#include "cuda/gqa_attention/instance.cuh"

GQA_ATTEND_INSTANCE(__half, 3);
GQA_ATTEND_INSTANCE(__half, 7);
