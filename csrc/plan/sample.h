#pragma once

#include "gqa_kernels.h"

namespace gqa {

// Everything the launcher and the CPU twin rely on; the torch layer says the same in sentences.
gqa_status check_params(const gqa_sample_params *p);

// A block's threads, and the columns of its histogram: with 64, no cell of 32 bits overflows up to the largest
// vocabulary, and the lanes of a warp never meet in one bank.
constexpr int kSampleThreads = 1024;
constexpr int kSampleColumns = 64;

}  // namespace gqa
