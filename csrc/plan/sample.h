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
// histogram in a column a lane. Threads that hold logits; one warp more decides. Many, where the part is large: 28
// warps divide 128256 logits in two evenly.
constexpr int kSampleClusterColumns = 32;
constexpr int kSampleClusterRows = 352;
constexpr int kSampleClusterCells = (kSampleClusterRows + 1 + 2 * 65) * kSampleClusterColumns;  // rows of words
constexpr int kSampleClusterTold = 1024;         // bytes that a block tells each other of digits, in two rounds
constexpr int kSampleClusterStatic = 11 * 1024;  // bytes its static shared memory stays below
constexpr int kSampleInverseBits = 31;
constexpr int kSampleClusterFew = 512, kSampleClusterMany = 896;

// Where logits are adjusted as they are read: fewer threads, with registers for what is read beside them; and the most
// adjusted logits that a block holds apart.
constexpr int kSampleClusterAdjusted = 608;
constexpr int kSampleExtras = 4096;

// Vectors of 16 bytes in one of the 32 stretches that each of `blocks` cuts its part of a row into; and the dynamic
// shared memory of a block.
int64_t sample_stretch(const gqa_sample_params *p, int64_t blocks);
int64_t sample_cluster_memory(const gqa_sample_params *p, int64_t blocks);

// At temperature 0 for all rows: only the largest logit is looked for.
constexpr int kSampleGreedyThreads = 512;

}  // namespace gqa
