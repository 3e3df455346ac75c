// What the blocks of a sampling cluster tell each other: where it lies in shared memory, and one-way stores into it
// that complete a barrier of the receiver. A block leaves only when everything addressed to it has arrived.
#pragma once

#include "common/sampling_draw.h"
#include "cuda/common/vec.cuh"
#include "cuda/sample_sm90/scale.cuh"
#include "plan/sample.h"

namespace gqa::cuda {

using namespace gqa::sampling;
using u64 = unsigned long long;

constexpr uint32_t kAll = 0xffffffffu;
constexpr int kMaxBlocks = 16;
constexpr int kColumns = kSampleClusterColumns;  // of a histogram: one a stretch of a block's part, and a lane
constexpr int kRows = kSampleClusterRows;        // of the histogram, and of what becomes of it
constexpr int kGroupRows = 32;                   // summed by one warp, a lane a row
constexpr int kGroups = kRows / kGroupRows;
constexpr int kMaxSlots = 16 * kGroupRows;  // 16 blocks with a group each, or 8 with two
constexpr int kLeastRow = kRows - 1;        // after the bins: what min-p leaves out of the row in which it ends
constexpr int kNoRow = kRows;               // for tokens without mass
constexpr int kDigits = 64;                 // of the key, told apart in one round of select
constexpr int kDigitBits = 6;
constexpr int kFew = 128;  // tokens that one block can sort out by itself
constexpr int kOfExtras = 31;
constexpr uint32_t kRow = kColumns * sizeof(uint32_t);
constexpr int kCountShift = 40;  // a word counts above bit 40 and sums m below it,
constexpr int kFlagShift = 59;   // and above that it says how many blocks have extras among those tokens
constexpr uint32_t kExtraFlag = 1u << 20, kCountOfCell = kExtraFlag - 1;  // and so does a cell that counts
static_assert(kGroups * kGroupRows == kRows && kLeastRow >= static_cast<int>(kBins));

__device__ __forceinline__ uint64_t sum_of(u64 word) { return word & ((u64{1} << kCountShift) - 1); }
__device__ __forceinline__ uint64_t count_of(u64 word) {
  return word << (64 - kFlagShift) >> (64 - kFlagShift + kCountShift);
}

// Of a group's rows, from its first to this one.
struct alignas(16) Running {
  u64 sum, mass;
};

// Digits of the key: (high - key) >> shift. Bits below those in which the row's type can differ are ones in `high`.
struct Digits {
  uint32_t high, shift;
};

// A pass over the logits that the controller asks of the workers.
struct Order {
  enum Kind { kSelect, kCollect, kFirst, kPick, kDone } kind;
  uint32_t first_row;     // of the histogram: earlier rows are above
  float least, most;      // exponents, `least` included
  float lowest, highest;  // logits, both included
  Digits digits;
  float steps, first;  // digit by exponent: (most - t) * steps + first, rounded; `first` is kUnit or more
  uint32_t within;     // by key: only tokens from this digit by exponent on
  uint32_t key;        // to look for; or a stretch
  uint32_t last;       // digit of those that select keeps: the answer
  bool by_exponent, counts, counts_above;  // count tokens by digit; and those above
};

// The rows in which a filter may end, the first and the last; wanted: the number of tokens or the mass up to there.
struct Span {
  uint32_t first, last;
  uint64_t wanted;
};

// kList comes last: it is opened when the number of tokens is known.
enum Message { kEnds, kNumbers, kScatter, kGather, kParts, kRound, kList = kRound + 2, kMessages };

struct Shared {
  u64 barriers[kMessages];
  Running rows[kRows + 1];  // the last: what min-p keeps of its row
  u64 slots[kMaxSlots];     // [block][groups that this block sums][row]
  u64 parts[kMaxBlocks];
  u64 ends[kMaxBlocks], numbers[kMaxBlocks];
  u64 of_warp[32];          // ends, or what is looked for; of the ends one is the controller's and one that of extras
  uint32_t listed, extras;  // tokens of this block
  Settings settings;
  Random random;
  Scale scale;
  Span span;
  uint32_t selected[kColumns];  // by earlier rounds of a select, of each stretch
  Order order;
};
static_assert(sizeof(Shared) <= kSampleClusterStatic);

// Dynamic shared memory ahead of what the blocks tell of digits, and of the logits. Sums of m, or numbers of tokens: a
// row a bin, a share of one or a digit, a column a stretch, so that they say where a token lies. The list needs no
// histogram.
struct Cells {
  union {
    uint32_t histogram[kRows + 1][kColumns];
    struct {
      u64 sent[kMaxBlocks][kFew], list[kFew], sorted[kFew], masses[kFew];
      uint32_t m[kFew], bins[kFew], sums[kFew];
    } few;
  };
  uint32_t sums[kDigits + 1][kColumns], counts[kDigits + 1][kColumns];  // the last row for tokens to leave out

  // What a block told in a round that uses this slot.
  __device__ __forceinline__ u64 *told(uint32_t slot, uint32_t blocks, uint32_t rank) {
    return reinterpret_cast<u64 *>(this + 1) + (slot * blocks + rank) * kDigits;
  }
};
static_assert(sizeof(Cells) == kSampleClusterCells * sizeof(uint32_t) &&
              kSampleClusterTold == 2 * kDigits * sizeof(u64));

__device__ __forceinline__ uint32_t lane() { return threadIdx.x % 32; }
__device__ __forceinline__ uint32_t warp() { return threadIdx.x / 32; }

// The lane's word. Its address is worked out anew: kept for the next time it would cost a register throughout.
__device__ __forceinline__ u64 own_word(const u64 *words) {
  uint32_t at = lane();
  asm volatile("" : "+r"(at));
  return words[at];
}

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
enum Meeting { kOrdered = 1, kWorkers, kPassed, kWeighed };

template <int kThreads>
__device__ __forceinline__ void meet(Meeting meeting) {
  asm volatile("bar.sync %0, %1;" ::"r"(static_cast<int>(meeting)), "n"(kThreads) : "memory");
}

template <int kThreads>
__device__ __forceinline__ void announce(Meeting meeting) {
  asm volatile("bar.arrive %0, %1;" ::"r"(static_cast<int>(meeting)), "n"(kThreads) : "memory");
}

}  // namespace gqa::cuda
