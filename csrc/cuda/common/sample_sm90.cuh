// The Hopper kernel of sample; plan/sample.h says when it serves.
#pragma once

#include "cuda/common/launch.cuh"

namespace gqa::cuda {

gqa_status launch_sample_cluster(const gqa_sample_params &p, const gqa_launch &plan, cudaStream_t stream);

}  // namespace gqa::cuda
