// bfloat16 logits counted by their value while they are loaded: what a value weighs is then evaluated once, not once
// for each token that has it. Values of either sign from 2^-10 to 2^6 have a cell; vectors that hold others are listed.
#pragma once

#include "cuda/sample_sm90/part.cuh"

namespace gqa::cuda {

constexpr uint32_t kTallyFirst = 0x3a80;  // the bits of 2^-10; 16 octaves of 128 values
constexpr uint32_t kTallyCells = 4096;    // 2048 of positive values, then as many of negative ones
constexpr uint32_t kTallyOthers = 2048;   // vectors at most

// Where a block holds much of a row: of few logits, few share a value.
template <typename T, int kThreads>
constexpr bool kTallies = (kThreads == kSampleClusterMany) && std::is_same_v<T, __nv_bfloat16>;

struct Tally {
  uint32_t counts[kTallyCells + 4];  // and one for values without a cell
  uint32_t others;                   // vectors that hold some; past kTallyOthers they are not all listed
  uint16_t listed[kTallyOthers];
};
static_assert(sizeof(Tally) <= kSampleTally && kSampleTally % 16 == 0);

// The place of a value with a cell; of another, has_cell() is false.
__device__ __forceinline__ uint32_t tally_offset(uint32_t bits) { return bits - kTallyFirst; }
__device__ __forceinline__ bool has_cell(uint32_t offset) { return (offset & 0x7800) == 0; }
__device__ __forceinline__ uint32_t cell_of(uint32_t offset) { return (offset & 0x7ff) | (offset >> 4 & 0x800); }
__device__ __forceinline__ float value_of(uint32_t cell) {
  return from_bits(((cell & 0x7ff) + kTallyFirst) << 16 | (cell & 0x800) << 20);
}

// Whether the row's weights come from the counts. max: the row's largest logit.
__device__ __forceinline__ bool is_counted(const Tally &tally, float max) {
  return max < INFINITY && tally.others <= kTallyOthers;
}

// Whether each token from `lowest` to `highest` has a cell.
__device__ __forceinline__ bool have_cells(float lowest, float highest) {
  const float least = fminf(fabsf(lowest), fabsf(highest)), most = fmaxf(fabsf(lowest), fabsf(highest));
  return lowest * highest > 0.0f && least >= 0x1p-10f && most < 0x1p6f;
}

// Counts a vector that holds nothing but tokens.
__device__ __forceinline__ void count_vector(Tally *tally, int v, const Vec<__nv_bfloat16> &vec) {
  const uint4 quad = *reinterpret_cast<const uint4 *>(&vec);
  const uint32_t words[4] = {quad.x, quad.y, quad.z, quad.w};
  const uint32_t counts = static_cast<uint32_t>(__cvta_generic_to_shared(tally->counts));
  bool all = true;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const uint32_t offset = tally_offset(i % 2 == 0 ? words[i / 2] & 0xffff : words[i / 2] >> 16);
    const bool counted = has_cell(offset);
    all = all && counted;
    add_shared(counts + (counted ? cell_of(offset) : kTallyCells) * sizeof(uint32_t), 1);
  }
  if (all) return;
  const uint32_t at = atomicAdd(&tally->others, 1);
  if (at < kTallyOthers) tally->listed[at] = static_cast<uint16_t>(v);
}

}  // namespace gqa::cuda
