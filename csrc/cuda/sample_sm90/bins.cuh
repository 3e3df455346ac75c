// The rows of the whole row of logits: how the cluster sums its blocks' histograms, and what the sums answer.
#pragma once

#include "cuda/sample_sm90/exchange.cuh"

namespace gqa::cuda {

// The exponents of a bin, ends included: halves go to the even bin.
__device__ __forceinline__ float least_of_bin(uint32_t bin) {
  const float edge = mul(static_cast<float>(bin) + 0.5f, -0.125f);
  return bin + 1 == kBins ? -43.75f : (bin % 2 == 0 ? edge : from_bits(to_bits(edge) - 1));
}

__device__ __forceinline__ float most_of_bin(uint32_t bin) {
  const float edge = mul(static_cast<float>(bin) - 0.5f, -0.125f);
  return bin == 0 ? 0.0f : (bin % 2 == 0 ? edge : from_bits(to_bits(edge) + 1));
}

// A row of the histogram. Threads start at different columns, so that they do not meet in one bank.
__device__ __forceinline__ u64 sum_of_row(const uint32_t (&columns)[kColumns], uint32_t turn) {
  const uint4 *cells = reinterpret_cast<const uint4 *>(columns);
  u64 sum = 0;
#pragma unroll
  for (uint32_t i = 0; i < kColumns / 4; ++i) {
    const uint4 cell = cells[(i + turn) % (kColumns / 4)];
    sum += u64{cell.x} + cell.y + (u64{cell.z} + cell.w);
  }
  return sum;
}

// Each row's sum goes to the block that sums its group, and as the least row's what min-p keeps of the row it ends in.
__device__ __forceinline__ void scatter_sums(const Exchange &exchange, uint32_t end_of_least, Shared *shared,
                                             const Cells &cells) {
  const uint32_t row = threadIdx.x;
  if (row >= kRows) return;
  u64 sum = sum_of_row(cells.histogram[row == kLeastRow && end_of_least < kBins ? end_of_least : row], row);
  if (row == end_of_least) sum += sum_of_row(cells.histogram[kLeastRow], row);
  const uint32_t group = row / kGroupRows, place = exchange.place_of(group);
  const uint32_t slot = exchange.rank * exchange.most_groups() + place;
  exchange.send(group - place * exchange.blocks, shared->slots + slot * kGroupRows + row % kGroupRows, kScatter, sum);
}

// One warp sums the block's group of rows at this place over the blocks and tells every `warps`-th of them, from
// `first` on. A bin's mass is that of its sum, so of part of a bin it is that of the part's.
__device__ __forceinline__ void gather_rows(const Exchange &exchange, uint32_t place, uint32_t first, uint32_t warps,
                                            uint32_t shift, Shared *shared) {
  const uint32_t row = (place * exchange.blocks + exchange.rank) * kGroupRows + lane();
  const uint32_t step = exchange.most_groups() * kGroupRows;
  const u64 *slot = shared->slots + place * kGroupRows + lane();
  exchange.receive(kScatter);
  u64 sum = 0;
#pragma unroll 4
  for (uint32_t i = 0; i < exchange.blocks; ++i, slot += step) sum += *slot;
  const u64 of_row = row < kBins ? sum : 0, sums = running_sum(of_row);
  u64 part = of_row;
  if (shift != 0) {
    const uint32_t first = lane() >> shift << shift;
    const u64 below = __shfl_sync(kAll, sums, first - 1);
    part = sums - (first == 0 ? 0 : below);
  }
  const u64 mass = bin_mass(part, row >> shift);
  const bool ends = ((row + 1) >> shift << shift) == row + 1;
  const u64 masses = running_sum(ends ? mass : 0) + (ends ? 0 : mass);
#pragma unroll 2
  for (uint32_t to = first; to < exchange.blocks; to += warps) {
    exchange.send(to, shared->rows + row, kGather, sums, masses);
    if (row == kLeastRow) exchange.send(to, shared->rows + kRows, kGather, sum, u64{0});
  }
}

// A row or a bin, and the mass before it and up to its end.
struct Place {
  uint32_t at;
  uint64_t before, end;
};

// For one warp, once all groups of rows have arrived.
class Bins {
 public:
  __device__ explicit Bins(const Shared *shared) : rows_(shared->rows) {}

  __device__ __forceinline__ void add_up(uint32_t shift) {
#pragma unroll
    for (uint32_t group = 0; group < kGroups; ++group) {
      const Running of_group = rows_[group * kGroupRows + kGroupRows - 1];
      if (lane() > group) before_ = {before_.sum + of_group.sum, before_.mass + of_group.mass};
    }
    shift_ = shift;
  }

  __device__ __forceinline__ uint32_t bin_of(uint32_t row) const { return row >> shift_; }
  __device__ __forceinline__ uint32_t first_of(uint32_t bin) const { return bin << shift_; }
  __device__ __forceinline__ uint32_t rows_of_bin() const { return 1u << shift_; }

  // Of a bin; its rows are of one group.
  __device__ __forceinline__ uint64_t sum(uint32_t bin) const {
    const uint32_t first = first_of(bin);
    return rows_[first + rows_of_bin() - 1].sum - (first % kGroupRows == 0 ? 0 : rows_[first - 1].sum);
  }

  // Of all rows before this one; all of them where it is none. Within a bin the mass is that of the rows before.
  __device__ __forceinline__ Running before(uint32_t row) const {
    row = min(row, 0u + kRows);
    const uint32_t group = row / kGroupRows;
    const Running sums{__shfl_sync(kAll, before_.sum, group), __shfl_sync(kAll, before_.mass, group)};
    if (row % kGroupRows == 0) return sums;
    const Running of_group = rows_[row - 1];
    return {sums.sum + of_group.sum, sums.mass + of_group.mass};
  }

  __device__ __forceinline__ uint64_t mass() const { return __shfl_sync(kAll, before_.mass, kGroups); }

  __device__ __forceinline__ uint64_t mass_of(const Kept &kept) const {
    return kept.bin >= kBins ? mass() : before(first_of(kept.bin)).mass + bin_mass(kept.sum, kept.bin);
  }

  // The first row at which the running mass reaches this; kBins where none does.
  __device__ __forceinline__ Place find_mass(uint64_t need) const { return find(before_.mass, &Running::mass, need); }

  // Its bin.
  __device__ __forceinline__ Place find_bin(uint64_t need) const {
    const Place place = find_mass(need);
    if (shift_ == 0) return place;
    const uint32_t bin = bin_of(place.at);
    return {bin, before(first_of(bin)).mass, before(first_of(bin + 1)).mass};
  }

  // Sums of m bound a count from both sides: the last of the k tokens lies in few rows, mostly one.
  __device__ __forceinline__ Span span_of_count(uint64_t top_k) const {
    return {find_sum(top_k * kLeastM).at, min(find_sum(top_k * kMostM).at, kBins - 1), top_k};
  }

  __device__ __forceinline__ Span span_of_mass(uint64_t wanted) const {
    const uint32_t row = find_mass(wanted).at;
    return {row, row, wanted};
  }

 private:
  __device__ __forceinline__ Place find_sum(uint64_t need) const { return find(before_.sum, &Running::sum, need); }

  __device__ __forceinline__ Place find(u64 before, u64 Running::*of, u64 need) const {
    const uint32_t reached = __ballot_sync(kAll, lane() - 1 < kGroups && before >= need);
    if (reached == 0) return {kBins, 0, 0};
    const uint32_t group = __ffs(reached) - 2;
    const u64 base = __shfl_sync(kAll, before, group);
    const u64 running = base + rows_[group * kGroupRows + lane()].*of;
    const uint32_t at = __ffs(__ballot_sync(kAll, running >= need)) - 1;
    const u64 below = __shfl_sync(kAll, running, at - 1);
    return {group * kGroupRows + at, at == 0 ? base : below, __shfl_sync(kAll, running, at)};
  }

  const Running *rows_;
  uint32_t shift_ = 0;
  Running before_{};  // lane i has the totals of the groups before the i-th
};

}  // namespace gqa::cuda
