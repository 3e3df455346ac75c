// What the blocks of a sampling cluster tell each other: where it lies in shared memory, and one-way stores into it
// that complete a barrier of the receiver. A block leaves only when everything addressed to it has arrived.
#pragma once

#include "common/sampling_draw.h"
#include "cuda/common/cluster.cuh"
#include "cuda/common/mbarrier.cuh"
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
constexpr int kLeastEntry = kBinEntries - 1;  // after the bins, for the bin in which min-p ends
constexpr int kNoRow = kBinEntries;           // of the histogram: for tokens without mass
constexpr int kDigits = 64;                   // of the key, told apart in one round of select
constexpr int kDigitBits = 6;
constexpr int kCountShift = 40;  // a word counts above bit 40 and sums m below it
static_assert(kGroups * kGroupBins == kBinEntries && kLeastEntry >= static_cast<int>(kBins));
static_assert(kGroupBins <= 32 && kGroups <= 32);

__device__ __forceinline__ uint64_t sum_of(u64 word) { return word & ((u64{1} << kCountShift) - 1); }
__device__ __forceinline__ uint64_t count_of(u64 word) { return word >> kCountShift; }

// Of a group's bins, from its first to this one.
struct alignas(16) Running {
  u64 sum, mass;
};

// A pass over the logits that the controller asks of the workers.
struct Order {
  enum Kind { kSelect, kPick, kFirst } kind;
  float least, most;          // exponents, both included
  float lowest, highest;      // logits, both included
  uint32_t high, shift;       // digit: (high - key) >> shift
  bool counts, counts_above;  // count tokens by digit; and those above `most`
};

enum Message { kMaxima, kNumbers, kScatter, kGather, kParts, kRound, kMessages = kRound + 2 };

struct Shared {
  u64 barriers[kMessages];
  Running bins[kBinEntries + 1];  // the last: what min-p keeps of its bin
  u64 slots[kBinEntries];         // [block][bins of the groups that this block sums]
  u64 parts[kMaxBlocks];
  uint32_t maxima[kMaxBlocks], numbers[kMaxBlocks];
  uint16_t noted[32][32];  // by warp: vectors to look at
  uint32_t of_warp[32];    // the controller's is the last
  Settings settings;
  Order order;
};
static_assert(sizeof(Shared) <= kSampleClusterStatic);

// Dynamic shared memory ahead of the logits: the histogram, one column a lane. Once its sums are out, select uses
// its first rows and receives in the rest; then pick leaves the sums of its chunks there.
union Cells {
  uint32_t histogram[kBinEntries + 1][kColumns];
  struct {
    uint32_t sums[kDigits][kColumns], counts[kDigits][kColumns];
    u64 slots[2][kMaxBlocks][kDigits];
  } select;
  uint32_t chunk_sums[2048];
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

// Named barriers of the block.
enum Meeting { kOrdered = 1, kWorkers, kPassed, kSummed };

template <int kThreads>
__device__ __forceinline__ void meet(Meeting meeting) {
  asm volatile("bar.sync %0, %1;" ::"r"(static_cast<int>(meeting)), "n"(kThreads) : "memory");
}

template <int kThreads>
__device__ __forceinline__ void announce(Meeting meeting) {
  asm volatile("bar.arrive %0, %1;" ::"r"(static_cast<int>(meeting)), "n"(kThreads) : "memory");
}

class Exchange {
 public:
  __device__ explicit Exchange(Shared *shared) : rank(cluster_rank()), blocks(cluster_size()), shared_(*shared) {}

  // For one thread; the cluster's barrier must come between it and the first push.
  __device__ void open() const {
    const uint32_t bytes[kMessages] = {blocks * 4, blocks * 4,           kBinEntries * 8,     (kBinEntries + 1) * 16,
                                       blocks * 8, blocks * kDigits * 8, blocks * kDigits * 8};
#pragma unroll
    for (int i = 0; i < kMessages; ++i) {
      mbarrier_init(barrier(i), 1);
      mbarrier_arrive_expect(barrier(i), bytes[i]);
    }
    mbarrier_fence_init();
  }

  template <typename... Values>
  __device__ __forceinline__ void send(uint32_t to, const void *at, int message, Values... values) const {
    push(map_to_rank(static_cast<uint32_t>(__cvta_generic_to_shared(at)), to), values...,
         map_to_rank(barrier(message), to));
  }

  __device__ __forceinline__ void receive(int message, uint32_t parity = 0) const {
    mbarrier_wait_cluster(barrier(message), parity);
  }

  __device__ uint32_t log_blocks() const { return (blocks > 1) + (blocks > 2) + (blocks > 4) + (blocks > 8); }

  // Expects the next round of select but one.
  __device__ void expect_again(int message) const { mbarrier_arrive_expect(barrier(message), blocks * kDigits * 8); }

  const uint32_t rank, blocks;

 private:
  __device__ uint32_t barrier(int message) const {
    return static_cast<uint32_t>(__cvta_generic_to_shared(shared_.barriers + message));
  }

  Shared &shared_;
};

}  // namespace gqa::cuda
