// How a row's token is drawn, in terms of what a row can do: CPU rows loop, CUDA rows are a block at work on one row,
// whose threads all run draw() with the same values. A Row has
//
//   top()                       {key, has_nan} of the largest logit
//   first(key)                  the lowest index that holds it
//   weigh(max, scale, counts)   prepares sum(bin) and, if asked, count(bin) of every bin
//   total(weight)               weight(bin) summed over the bins
//   find(weight, need)          the first bin at which the running total reaches need, and the total before it
//   select(bin, by_count, need) the largest key such that the bin's tokens from it up count, or weigh, at least need
//   kept_sum(kept)              the summed m of the tokens that kept holds of its boundary bin
//   pick(kept, bin, need)       the first token, by index, at which the running sum of m over the bin reaches need
#pragma once

#include "common/sampling_logits.h"

#if defined(__CUDACC__)
#define GQA_SAMPLING __device__ __forceinline__
#define GQA_ROLLED _Pragma("unroll 1")
#else
#define GQA_SAMPLING inline
#define GQA_ROLLED
#endif

namespace gqa::sampling {

struct Top {
  uint32_t key;
  bool has_nan;
};

struct Found {
  uint32_t bin;
  uint64_t before;
};

struct Picked {
  int64_t index;
  uint32_t m;
};

// Bins before `bin` are kept whole, and of `bin` the tokens that reach both thresholds, whose m sum to `sum`.
struct Kept {
  uint32_t bin = kBins;
  uint32_t key = ~0u;
  float exponent = -64.0f;
  uint64_t sum = 0;

  GQA_HOST_DEVICE bool holds(uint32_t of_bin, uint32_t of_key, float of_exponent) const {
    return of_bin < bin || (of_bin == bin && of_key >= key && of_exponent >= exponent);
  }
};

// One row's settings, from its own values or the call's.
struct Settings {
  bool greedy;
  float scale;
  int64_t top_k;
  uint64_t top_p;
  float least_exponent;
  Random random;
};

GQA_HOST_DEVICE bool has_rows(const gqa_index &index) { return index.data != nullptr && index.stride[0] != 0; }

GQA_HOST_DEVICE Settings load_settings(const gqa_sample_params &p, int64_t row) {
  const float temperature = value_or(p.temperatures, p.temperatures_stride, p.temperature, row);
  const uint64_t seed = load_index_or(p.seeds, static_cast<int64_t>(p.seed), row);
  const uint64_t offset = load_index_or(p.offsets, static_cast<int64_t>(p.offset), row);
  Settings s;
  s.greedy = !(temperature > 0.0f);
  s.scale = scale_of(temperature);
  s.top_k = load_index_or(p.top_ks, p.top_k, row);
  s.top_p = share_of_top_p(value_or(p.top_ps, p.top_ps_stride, p.top_p, row));
  s.least_exponent = least_exponent(value_or(p.min_ps, p.min_ps_stride, p.min_p, row));
  s.random = philox(seed, offset, has_rows(p.seeds) || has_rows(p.offsets) ? 0 : row);
  return s;
}

// The token and its probability under the filters: its bin's share of the mass times its share of the bin.
struct Drawn {
  int64_t id;
  bool valid;
  uint64_t mass = 1, total = 1, m = 1, sum = 1;

  GQA_HOST_DEVICE float logprob() const {
    if (!valid) return from_bits(0x7fc00000u);
    const double of_bin = static_cast<double>(mass) / static_cast<double>(total);
    const double of_token = static_cast<double>(m) / static_cast<double>(sum);
    return static_cast<float>(log(of_bin * of_token));
  }
};

template <typename Row>
GQA_SAMPLING Drawn draw(Row &row, const Settings &s, int64_t vocab) {
  const Top top = row.top();
  const bool valid = !top.has_nan && top.key > kLowestKey;
  if (!valid || s.greedy) return {row.first(top.key), valid};

  const bool limited = s.top_k > 0 && s.top_k < vocab;
  row.weigh(key_to_logit(top.key), s.scale, limited);
  Kept kept;
  const auto mass = [&](uint32_t bin) {
    return bin > kept.bin ? 0 : bin_mass(bin == kept.bin ? kept.sum : row.sum(bin), bin);
  };

  // Top-k by count, top-p by mass, then the mass that is left.
  uint64_t total = 0;
  GQA_ROLLED
  for (int step = limited ? 0 : 1;; ++step) {
    const bool by_count = step == 0;
    const auto weight = [&](uint32_t bin) { return by_count ? row.count(bin) : mass(bin); };
    total = row.total(weight);
    if (step == 2 || (step == 1 && s.top_p >= kTopPOff)) break;
    const uint64_t wanted = by_count ? static_cast<uint64_t>(s.top_k) : share_of(total, s.top_p);
    if (total <= wanted && by_count) continue;
    const Found found = row.find(weight, wanted);
    const uint64_t left = wanted - found.before;
    kept.bin = found.bin;
    kept.key = row.select(found.bin, by_count, by_count ? left : sum_for_mass(left, found.bin));
    kept.sum = row.kept_sum(kept);
  }
  const uint32_t least_bin = weigh(s.least_exponent).bin;
  if (least_bin != kExcluded && least_bin <= kept.bin) {
    kept.key = least_bin < kept.bin ? 0 : kept.key;
    kept.bin = least_bin;
    kept.exponent = s.least_exponent;
    kept.sum = row.kept_sum(kept);
    total = row.total(mass);
  }

  const Found found = row.find(mass, mul_high(s.random.bin, total) + 1);
  const uint64_t sum = found.bin == kept.bin ? kept.sum : row.sum(found.bin);
  const Picked picked = row.pick(kept, found.bin, mul_high(s.random.token, sum) + 1);
  return {picked.index, true, mass(found.bin), total, picked.m, sum};
}

}  // namespace gqa::sampling
