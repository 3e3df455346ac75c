// The bins of the whole row: how the cluster sums its blocks' histograms, and what the sums answer.
#pragma once

#include "cuda/sample_sm90/exchange.cuh"

namespace gqa::cuda {

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

// Each bin's sum goes to the block that sums its group, and as the least entry's what min-p keeps of its bin.
__device__ __forceinline__ void scatter_sums(const Exchange &exchange, uint32_t least_bin, Shared *shared,
                                             const Cells &cells) {
  const uint32_t bin = threadIdx.x;
  if (bin >= kBinEntries) return;
  u64 sum = sum_of_row(cells.histogram[bin == kLeastEntry && least_bin < kBins ? least_bin : bin], bin);
  if (bin == least_bin) sum += sum_of_row(cells.histogram[kLeastEntry], bin);
  const uint32_t group = bin / kGroupBins, place = exchange.place_of(group);
  const uint32_t slot = exchange.rank * exchange.most_groups() + place;
  exchange.send(group - place * exchange.blocks, shared->slots + slot * kGroupBins + bin % kGroupBins, kScatter, sum);
}

// One warp sums the block's group of bins at this place over the blocks and tells every `warps`-th of them, from
// `first` on.
__device__ __forceinline__ void gather_bins(const Exchange &exchange, uint32_t place, uint32_t first, uint32_t warps,
                                            Shared *shared) {
  const bool holds = lane() < kGroupBins;
  const uint32_t bin = (place * exchange.blocks + exchange.rank) * kGroupBins + lane();
  const uint32_t step = exchange.most_groups() * kGroupBins;
  const u64 *slot = shared->slots + place * kGroupBins + lane();
  exchange.receive(kScatter);
  u64 sum = 0;
  if (holds) {
#pragma unroll 4
    for (uint32_t i = 0; i < exchange.blocks; ++i, slot += step) sum += *slot;
  }
  const bool is_bin = holds && bin < kBins;
  const u64 sums = running_sum(is_bin ? sum : 0), masses = running_sum(is_bin ? bin_mass(sum, bin) : 0);
  if (!holds) return;
#pragma unroll 2
  for (uint32_t to = first; to < exchange.blocks; to += warps) {
    exchange.send(to, shared->bins + bin, kGather, sums, masses);
    if (bin == kLeastEntry) exchange.send(to, shared->bins + kBinEntries, kGather, sum, u64{0});
  }
}

// A bin, and the mass before it and up to its end.
struct Place {
  uint32_t bin;
  uint64_t before, end;
};

// For one warp, once all groups of bins have arrived.
class Bins {
 public:
  __device__ explicit Bins(const Shared *shared) : bins_(shared->bins) {}

  __device__ __forceinline__ void add_up() {
    const Running of_group = lane() < kGroups ? bins_[lane() * kGroupBins + kGroupBins - 1] : Running{0, 0};
    before_ = {running_sum(of_group.sum) - of_group.sum, running_sum(of_group.mass) - of_group.mass};
  }

  __device__ __forceinline__ uint64_t sum(uint32_t bin) const {
    return bins_[bin].sum - (bin % kGroupBins == 0 ? 0 : bins_[bin - 1].sum);
  }

  // Of all bins up to this one, it included.
  __device__ __forceinline__ uint64_t sum_to(uint32_t bin) const {
    return __shfl_sync(kAll, before_.sum, bin / kGroupBins) + bins_[bin].sum;
  }

  // Of all bins before this one.
  __device__ __forceinline__ Running before(uint32_t bin) const {
    const uint32_t group = bin / kGroupBins;
    const Running sums{__shfl_sync(kAll, before_.sum, group), __shfl_sync(kAll, before_.mass, group)};
    if (bin % kGroupBins == 0) return sums;
    const Running of_group = bins_[bin - 1];
    return {sums.sum + of_group.sum, sums.mass + of_group.mass};
  }

  __device__ __forceinline__ uint64_t mass() const { return __shfl_sync(kAll, before_.mass, kGroups); }

  __device__ __forceinline__ uint64_t mass_of(const Kept &kept) const {
    return kept.bin >= kBins ? mass() : before(kept.bin).mass + bin_mass(kept.sum, kept.bin);
  }

  // The first bin at which the running mass reaches this; kBins where none does.
  __device__ __forceinline__ Place find_mass(uint64_t need) const { return find(before_.mass, &Running::mass, need); }

  __device__ __forceinline__ Found find_kept(const Kept &kept, uint64_t mass) const {
    if (kept.bin < kBins) {
      const uint64_t whole = before(kept.bin).mass;
      if (mass > whole) return {kept.bin, whole};
    }
    const Place place = find_mass(mass);
    return {place.bin, place.before};
  }

  // Sums of m bound a count from both sides: the last of the k tokens lies in few bins, mostly one.
  __device__ __forceinline__ Span span_of_count(uint64_t top_k) const {
    const Place from = find_sum(top_k * kLeastM);
    return {{from.bin, from.before}, min(find_sum(top_k * kMostM).bin, kBins - 1), top_k};
  }

  __device__ __forceinline__ Span span_of_share(const Kept &kept, uint64_t top_p) const {
    const uint64_t wanted = share_of(mass_of(kept), top_p);
    const Found from = find_kept(kept, wanted);
    return {from, from.bin, wanted - from.before};
  }

 private:
  __device__ __forceinline__ Place find_sum(uint64_t need) const { return find(before_.sum, &Running::sum, need); }

  __device__ __forceinline__ Place find(u64 before, u64 Running::*of, u64 need) const {
    const uint32_t reached = __ballot_sync(kAll, lane() - 1 < kGroups && before >= need);
    if (reached == 0) return {kBins, 0, 0};
    const uint32_t group = __ffs(reached) - 2;
    const u64 base = __shfl_sync(kAll, before, group);
    const u64 running = base + bins_[group * kGroupBins + min(lane(), kGroupBins - 1u)].*of;
    const uint32_t at = __ffs(__ballot_sync(kAll, running >= need)) - 1;
    const u64 below = __shfl_sync(kAll, running, at - 1);
    return {group * kGroupBins + at, at == 0 ? base : below, __shfl_sync(kAll, running, at)};
  }

  const Running *bins_;
  Running before_{};  // lane i has the totals of the groups before the i-th
};

}  // namespace gqa::cuda
