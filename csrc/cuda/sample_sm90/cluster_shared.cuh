// What the blocks of a sampling cluster tell each other: where it lies in shared memory, and one-way stores into it
// that complete a barrier of the receiver. A block leaves only when everything addressed to it has arrived.
#pragma once

#include "common/sampling_draw.h"
#include "cuda/common/vec.cuh"
#include "plan/sample.h"

namespace gqa::cuda {

using namespace gqa::sampling;
using u64 = unsigned long long;

constexpr uint32_t kAll = 0xffffffffu;
constexpr int kMaxBlocks = 16;
constexpr int kColumns = kSampleClusterColumns;
constexpr int kBinEntries = kSampleClusterBins;
constexpr int kGroups = 16;  // of bins, each summed by one warp
constexpr int kGroupBins = kBinEntries / kGroups;
constexpr int kMaxSlots = 21 * kGroupBins;    // 7 blocks with up to 3 groups each
constexpr int kLeastEntry = kBinEntries - 1;  // after the bins, for the bin in which min-p ends
constexpr int kNoRow = kBinEntries;           // of the histogram: for tokens without mass
constexpr int kDigits = 64;                   // of the key, told apart in one round of select
constexpr int kDigitBits = 6;
constexpr int kFew = 128;        // tokens that one block can sort out by itself
constexpr int kMaxChunks = 384;  // of 32 vectors that a block's memory can hold
constexpr uint32_t kRow = kColumns * sizeof(uint32_t);
constexpr int kLimb = 18;        // bits of a product's lower part, where the histogram holds products in two
constexpr int kCountShift = 40;  // a word counts above bit 40 and sums m below it
static_assert(kGroups * kGroupBins == kBinEntries && kLeastEntry >= static_cast<int>(kBins));
static_assert(kGroupBins <= 32 && kGroups <= 32);

__device__ __forceinline__ uint64_t sum_of(u64 word) { return word & ((u64{1} << kCountShift) - 1); }
__device__ __forceinline__ uint64_t count_of(u64 word) { return word >> kCountShift; }

// Of a group's bins, from its first to this one.
struct alignas(16) Running {
  u64 sum, mass;
};

// A float from which on the last place is 1, and its bits: adding it rounds to an integer.
constexpr float kUnit = 0x1p23f;
constexpr uint32_t kUnits = 0x4b000000u;

// Digits of the key: (high - key) >> shift.
struct Digits {
  uint32_t high, shift;
};

// A pass over the logits that the controller asks of the workers.
struct Order {
  enum Kind { kSelect, kPick, kCollect, kFirst } kind;
  float least, most;      // exponents, both included
  float lowest, highest;  // logits, both included
  Digits digits;
  float steps, first;  // digit by exponent: (most - t) * steps + first, rounded; `first` is kUnit or more
  uint32_t within;     // by key: only tokens with this digit by exponent, or kAll
  uint32_t key;        // to look for
  bool by_exponent, counts, counts_above;  // count tokens by digit; and those above `most`
  bool told;                               // of kPick: the block's sum is known to the cluster
};

// The bins in which a filter may end, the first and the last; wanted: up to there by count, else within them.
struct Span {
  Found from;
  uint32_t last_bin;
  uint64_t wanted;
};

// kList comes last: it is opened when the number of tokens is known.
enum Message { kEnds, kNumbers, kScatter, kGather, kParts, kRound, kList = kRound + 2, kMessages };

struct Shared {
  u64 barriers[kMessages];
  Running bins[kBinEntries + 1];  // the last: what min-p keeps of its bin
  u64 slots[kMaxSlots];           // [block][groups that this block sums][bin]
  u64 parts[kMaxBlocks];
  u64 own[kBinEntries];  // of this block, each bin's sum; and what min-p keeps of its bin
  u64 ends[kMaxBlocks], numbers[kMaxBlocks];
  u64 of_warp[32];  // ends, what is looked for, or what may be picked; of the ends the last is the controller's
  uint32_t listed;  // tokens of this block
  Settings settings;
  Random random;
  Span span;
  Order order;
};
static_assert(sizeof(Shared) <= kSampleClusterStatic);

// Dynamic shared memory ahead of the logits: the histogram, one column a lane. Once its sums are out, select and pick
// use its rows.
union Cells {
  uint32_t histogram[kBinEntries + 1][kColumns];
  struct {
    uint32_t sums[kDigits + 1][kColumns], counts[kDigits + 1][kColumns];  // the last row for tokens to leave out
    u64 slots[2][kMaxBlocks][kDigits];
    uint32_t chunks[kMaxChunks];  // by 32 vectors, what may be picked weighs
  } select;
  struct {
    uint32_t of_select[2 * (kDigits + 1)][kColumns];
    u64 sent[kMaxBlocks][kFew], list[kFew], sorted[kFew], masses[kFew];
    uint32_t m[kFew], bins[kFew], sums[kFew];
  } few;
};
static_assert(sizeof(Cells) == kSampleClusterCells * sizeof(uint32_t));

__device__ __forceinline__ uint32_t lane() { return threadIdx.x % 32; }
__device__ __forceinline__ uint32_t warp() { return threadIdx.x / 32; }

template <uint32_t kLanes = 32>
__device__ __forceinline__ u64 running_sum(u64 value) {
#pragma unroll
  for (uint32_t offset = 1; offset < kLanes; offset <<= 1) {
    const u64 below = __shfl_up_sync(kAll, value, offset);
    if (lane() >= offset) value += below;
  }
  return value;
}

__device__ __forceinline__ u64 sum_of_lanes(uint32_t value) {
  return (u64{__reduce_add_sync(kAll, value >> 16)} << 16) + __reduce_add_sync(kAll, value & 0xffffu);
}

// The largest of the warp's upper halves, and of its lower halves.
__device__ __forceinline__ u64 max_of_halves(u64 word) {
  const uint32_t high = __reduce_max_sync(kAll, static_cast<uint32_t>(word >> 32));
  return u64{high} << 32 | __reduce_max_sync(kAll, static_cast<uint32_t>(word));
}

// An address in shared memory as a number: computed in one step from the bits that hold a bin or a digit.
__device__ __forceinline__ void add_shared(uint32_t address, uint32_t value) {
  asm volatile("red.shared.add.u32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}

// Named barriers of the block.
enum Meeting { kOrdered = 1, kWorkers, kPassed, kSummed, kWeighed };

template <int kThreads>
__device__ __forceinline__ void meet(Meeting meeting) {
  asm volatile("bar.sync %0, %1;" ::"r"(static_cast<int>(meeting)), "n"(kThreads) : "memory");
}

template <int kThreads>
__device__ __forceinline__ void announce(Meeting meeting) {
  asm volatile("bar.arrive %0, %1;" ::"r"(static_cast<int>(meeting)), "n"(kThreads) : "memory");
}

}  // namespace gqa::cuda
