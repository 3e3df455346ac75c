#pragma once

#include "gqa_kernels.h"

namespace gqa {

// Everything the launcher and the CPU twin rely on; the torch layer says the same in sentences.
gqa_status check_params(const gqa_sample_params *p);

// A block's threads, and the columns of its histogram: with 64, no cell of 32 bits overflows up to the largest
// vocabulary, and the lanes of a warp never meet in one bank.
constexpr int kSampleThreads = 1024;
constexpr int kSampleColumns = 64;

// The Hopper kernel: the blocks of a cluster share a row, each with its part of the logits in shared memory beside a
// histogram of sums in 32 columns and one of counts, two bins to a word.
constexpr int kSampleClusterColumns = 32;
constexpr int kSampleClusterBins = 352;
constexpr int kSampleClusterCells = (kSampleClusterBins + kSampleClusterBins / 2) * kSampleClusterColumns;
constexpr int kSampleClusterStatic = 8 * 1024;  // bytes its static shared memory stays below

}  // namespace gqa
