// What the kernel that streams weights past a few tokens is given: up to three matrices side by side, or gate and up.
#pragma once

#include "cuda/common/launch.cuh"
#include "plan/weight_stream.h"

namespace gqa::cuda {

struct WeightStream {
  const void *weights[3];    // [outputs of each, columns], of x's dtype or e4m3
  int64_t weight_stride[3];  // in elements
  const float *scale[2];     // of e4m3: [features], of weights[0] alone where they are gate and up, and of weights[1]
  const void *bias;          // [features] or nullptr
  const void *residual;      // [tokens, features] or nullptr
  int64_t residual_stride;
  const void *x;  // [tokens, columns]
  int64_t x_stride;
  void *out;  // [tokens, features]
  int64_t out_stride;
  int32_t ends[2];  // outputs of the first matrix, and of the first two: features where there are no more
  int32_t features, columns, tokens;
  int32_t rows, ring;  // of weights in a stage, and stages of a team: the launch sets them
  bool gated;          // out = swiglu of the products with weights[0] and weights[1]
  bool early;          // the weights may be read before the kernel before has ended
};

gqa_status launch_weight_stream(const gqa_launch &plan, int32_t dtype, const WeightStream &p, cudaStream_t stream);
gqa_status launch_e4m3_stream(const gqa_launch &plan, int32_t dtype, const WeightStream &p, cudaStream_t stream);

}  // namespace gqa::cuda
