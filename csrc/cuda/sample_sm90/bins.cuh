// The bins of the whole row: how the cluster sums its blocks' histograms, and what the sums answer.
#pragma once

#include "cuda/sample_sm90/exchange.cuh"

namespace gqa::cuda {

// A row of the histogram. Threads start at different columns, so that they do not meet in one bank.
// Cells of the second half count 2^shift.
__device__ __forceinline__ u64 sum_of_row(const uint32_t (&columns)[kColumns], uint32_t turn, int shift) {
  const uint4 *cells = reinterpret_cast<const uint4 *>(columns);
  u64 sum = 0;
#pragma unroll
  for (uint32_t i = 0; i < kColumns / 4; ++i) {
    const uint32_t at = (i + turn) % (kColumns / 4);
    const uint4 cell = cells[at];
    sum += (u64{cell.x} + cell.y + (u64{cell.z} + cell.w)) << (at >= kColumns / 8 ? shift : 0);
  }
  return sum;
}

// Each bin's sum goes to the block that sums its group, and as the least entry's what min-p keeps of its bin.
// Leaves the cells that select and pick add to at zero.
__device__ __forceinline__ void scatter_sums(const Exchange &exchange, uint32_t least_bin, int shift, Shared *shared,
                                             Cells *cells) {
  const uint32_t bin = threadIdx.x;
  if (bin >= kBinEntries) return;
  u64 sum = sum_of_row(cells->histogram[bin == kLeastEntry && least_bin < kBins ? least_bin : bin], bin, shift);
  if (bin == least_bin) sum += sum_of_row(cells->histogram[kLeastEntry], bin, shift);
  shared->own[bin] = sum;
  shared->own[bin] = sum;
  const uint32_t group = bin / kGroupBins, place = exchange.place_of(group);
  const uint32_t slot = exchange.rank * exchange.most_groups() + place;
  exchange.send(group - place * exchange.blocks, shared->slots + slot * kGroupBins + bin % kGroupBins, kScatter, sum);
  meet<kBinEntries>(kSummed);
  constexpr uint32_t kChunks = offsetof(Cells, select.chunks) / (kColumns * sizeof(uint32_t));
  constexpr uint32_t kChunkRows = sizeof(Cells::select.chunks) / (kColumns * sizeof(uint32_t));
  static_assert(kChunks + kChunkRows <= kBinEntries && kMaxChunks % kColumns == 0);
  if (bin >= 2 * (kDigits + 1) && bin - kChunks >= kChunkRows) return;
  uint4 *row = reinterpret_cast<uint4 *>(cells->histogram[bin]);
#pragma unroll
  for (int i = 0; i < kColumns / 4; ++i) row[(i + bin) % (kColumns / 4)] = make_uint4(0, 0, 0, 0);
}

// One warp sums the block's group of bins at this place over the blocks and tells all of them.
__device__ __forceinline__ void gather_bins(const Exchange &exchange, uint32_t place, Shared *shared) {
  exchange.receive(kScatter);
  const bool holds = lane() < kGroupBins;
  const uint32_t bin = (place * exchange.blocks + exchange.rank) * kGroupBins + lane();
  const u64 *slot = shared->slots + place * kGroupBins + lane();
  u64 sum = 0;
  if (holds) {
#pragma unroll
    for (uint32_t i = 0; i < kMaxBlocks; ++i)
      sum += i < exchange.blocks ? slot[i * exchange.most_groups() * kGroupBins] : 0;
  }
  const bool is_bin = holds && bin < kBins;
  const u64 sums = running_sum(is_bin ? sum : 0), masses = running_sum(is_bin ? bin_mass(sum, bin) : 0);
  if (!holds) return;
#pragma unroll 4
  for (uint32_t to = 0; to < exchange.blocks; ++to) {
    exchange.send(to, shared->bins + bin, kGather, sums, masses);
    if (bin == kLeastEntry) exchange.send(to, shared->bins + kBinEntries, kGather, sum, u64{0});
  }
}

// For one warp, once all groups of bins have arrived.
class Bins {
 public:
  __device__ explicit Bins(const Shared *shared) : bins_(shared->bins) {}

  __device__ __forceinline__ void add_up() {
    const Running of_group = lane() < kGroups ? bins_[lane() * kGroupBins + kGroupBins - 1] : Running{0, 0};
    groups_ = {running_sum<kGroups>(of_group.sum), running_sum<kGroups>(of_group.mass)};
  }

  __device__ __forceinline__ uint64_t sum(uint32_t bin) const {
    return bins_[bin].sum - (bin % kGroupBins == 0 ? 0 : bins_[bin - 1].sum);
  }

  // Of all bins before this one.
  __device__ __forceinline__ Running before(uint32_t bin) const {
    const uint32_t group = bin / kGroupBins;
    Running sums{__shfl_sync(kAll, groups_.sum, group - 1), __shfl_sync(kAll, groups_.mass, group - 1)};
    if (group == 0) sums = {0, 0};
    if (bin % kGroupBins == 0) return sums;
    const Running of_group = bins_[bin - 1];
    return {sums.sum + of_group.sum, sums.mass + of_group.mass};
  }

  // The first bin at which the running sum of m reaches need; kBins where none does.
  __device__ __forceinline__ Found find_sum(u64 need) const { return find(groups_.sum, &Running::sum, need); }

  __device__ __forceinline__ uint64_t mass_of(const Kept &kept) const {
    if (kept.bin >= kBins) return __shfl_sync(kAll, groups_.mass, kGroups - 1);
    return before(kept.bin).mass + bin_mass(kept.sum, kept.bin);
  }

  __device__ __forceinline__ Found find_kept(const Kept &kept, uint64_t mass) const {
    if (kept.bin < kBins) {
      const uint64_t whole = before(kept.bin).mass;
      if (mass > whole) return {kept.bin, whole};
    }
    return find(groups_.mass, &Running::mass, mass);
  }

  // Sums of m bound a count from both sides: the last of the k tokens lies in few bins, mostly one.
  __device__ __forceinline__ Span span_of_count(uint64_t top_k) const {
    const Found from = find_sum(top_k * kLeastM);
    return {from, min(find_sum(top_k * kMostM).bin, kBins - 1), top_k};
  }

  __device__ __forceinline__ Span span_of_share(const Kept &kept, uint64_t top_p) const {
    const uint64_t wanted = share_of(mass_of(kept), top_p);
    const Found from = find_kept(kept, wanted);
    return {from, from.bin, wanted - from.before};
  }

 private:
  __device__ __forceinline__ Found find(u64 groups, u64 Running::*of, u64 need) const {
    const uint32_t reached = __ballot_sync(kAll, lane() < kGroups && groups >= need);
    if (reached == 0) return {kBins, 0};
    const uint32_t group = __ffs(reached) - 1;
    const u64 earlier = __shfl_sync(kAll, groups, group - 1), base = group == 0 ? 0 : earlier;
    const u64 running = base + bins_[group * kGroupBins + min(lane(), kGroupBins - 1u)].*of;
    const uint32_t at = __ffs(__ballot_sync(kAll, running >= need)) - 1;
    const u64 below = __shfl_sync(kAll, running, at - 1);
    return {group * kGroupBins + at, at == 0 ? base : below};
  }

  const Running *bins_;
  Running groups_{};  // lane i has the totals of the groups up to the i-th
};

}  // namespace gqa::cuda
