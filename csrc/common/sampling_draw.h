// How a row's token is drawn, in terms of what a row can do: CPU rows loop, CUDA rows are a block at work on one row,
// whose threads all run draw() with the same values. A Row has
//
//   top()                       {key, has_nan} of the largest logit
//   first(key)                  the lowest index that holds it
//   weigh(max, scale, counts)   prepares sum(bin) and, if asked, count(bin) of every bin
//   keep(top_k, top_p)          what keeps the top_k likeliest tokens, or all where 0, and of them the likeliest with
//                               that share of their mass; ties with the last one kept are kept too
//   kept_sum(kept)              the summed m of the tokens that kept holds of its boundary bin
//   mass_of(kept)               of all the tokens that kept holds
//   find_kept(kept, mass)       the first bin at which their running mass reaches this, and the mass before it
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
};

GQA_HOST_DEVICE bool has_rows(const gqa_index &index) { return index.data != nullptr && index.stride[0] != 0; }

// Of a call, where no tensor has values per row.
GQA_HOST_DEVICE Settings settings_of(const gqa_sample_params &p) {
  Settings s;
  s.greedy = !(p.temperature > 0.0f);
  s.scale = scale_of(p.temperature);
  s.top_k = p.top_k;
  s.top_p = share_of_top_p(p.top_p);
  s.least_exponent = least_exponent(p.min_p);
  return s;
}

// Of a row, given those of the call.
GQA_HOST_DEVICE Settings load_settings(const gqa_sample_params &p, const Settings &of_call, int64_t row) {
  Settings s = of_call;
  if (p.temperatures != nullptr) {
    const float temperature = p.temperatures[row * p.temperatures_stride];
    s.greedy = !(temperature > 0.0f);
    s.scale = scale_of(temperature);
  }
  if (p.top_ps != nullptr) s.top_p = share_of_top_p(p.top_ps[row * p.top_ps_stride]);
  if (p.min_ps != nullptr) s.least_exponent = least_exponent(p.min_ps[row * p.min_ps_stride]);
  s.top_k = load_index_or(p.top_ks, p.top_k, row);
  return s;
}

GQA_HOST_DEVICE Random load_random(const gqa_sample_params &p, int64_t row) {
  const uint64_t seed = load_index_or(p.seeds, static_cast<int64_t>(p.seed), row);
  const uint64_t offset = load_index_or(p.offsets, static_cast<int64_t>(p.offset), row);
  return philox(seed, offset, has_rows(p.seeds) || has_rows(p.offsets) ? 0 : row);
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

// The filters, for a Row that also has
//   total(weight)               weight(bin) summed over the bins
//   find(weight, need)          the first bin at which the running total reaches need, and the total before it
//   select(bin, by_count, need) the largest key such that the bin's tokens from it up count, or weigh, at least need
template <typename Row>
class Filters {
 public:
  GQA_SAMPLING Kept keep(uint64_t top_k, uint64_t top_p) {
    const auto count = [this](uint32_t bin) { return row().count(bin); };
    Kept kept;
    GQA_ROLLED
    for (int step = 0; step < 2; ++step) {
      const bool by_count = step == 0;
      if (by_count ? top_k == 0 || row().total(count) <= top_k : top_p >= kTopPOff) continue;
      const uint64_t wanted = by_count ? top_k : share_of(mass_of(kept), top_p);
      const Found found = by_count ? row().find(count, wanted) : find_kept(kept, wanted);
      const uint64_t left = wanted - found.before;
      kept.bin = found.bin;
      kept.key = row().select(found.bin, by_count, by_count ? left : sum_for_mass(left, found.bin));
      kept.sum = row().kept_sum(kept);
    }
    return kept;
  }

  GQA_SAMPLING uint64_t mass_of(const Kept &kept) { return row().total(mass_by_bin(kept)); }

  GQA_SAMPLING Found find_kept(const Kept &kept, uint64_t mass) { return row().find(mass_by_bin(kept), mass); }

 private:
  GQA_HOST_DEVICE Row &row() { return static_cast<Row &>(*this); }

  GQA_HOST_DEVICE auto mass_by_bin(const Kept &kept) {
    return [this, &kept](uint32_t bin) {
      return bin > kept.bin ? uint64_t{0} : bin_mass(bin == kept.bin ? kept.sum : row().sum(bin), bin);
    };
  }
};

// Whether the row's token is drawn, not the likeliest's taken.
GQA_HOST_DEVICE bool is_drawn(const Top &top, const Settings &s) {
  return !s.greedy && !top.has_nan && top.key > kLowestKey;
}

// What is kept of a row, and the bin of its token. total: the mass kept; sum: of the bin's kept m.
struct Choice {
  Kept kept;
  uint32_t bin;
  uint64_t total, sum;
};

// Of a row that is weighed.
template <typename Row>
GQA_SAMPLING Choice choose(Row &row, const Settings &s, const Random &random, uint64_t top_k) {
  Kept kept = row.keep(top_k, s.top_p);
  const uint32_t least_bin = weigh(s.least_exponent).bin;
  if (least_bin != kExcluded && least_bin <= kept.bin) {
    kept.key = least_bin < kept.bin ? 0 : kept.key;
    kept.bin = least_bin;
    kept.exponent = s.least_exponent;
    kept.sum = row.kept_sum(kept);
  }
  const uint64_t total = row.mass_of(kept);
  const uint32_t bin = row.find_kept(kept, mul_high(random.bin, total) + 1).bin;
  return {kept, bin, total, bin == kept.bin ? kept.sum : row.sum(bin)};
}

template <typename Row>
GQA_SAMPLING Drawn take(Row &row, const Choice &choice, const Random &random) {
  const Picked picked = row.pick(choice.kept, choice.bin, mul_high(random.token, choice.sum) + 1);
  return {picked.index, true, bin_mass(choice.sum, choice.bin), choice.total, picked.m, choice.sum};
}

template <typename Row>
GQA_SAMPLING Drawn draw(Row &row, const Settings &s, const Random &random, int64_t vocab) {
  const Top top = row.top();
  if (!is_drawn(top, s)) return {row.first(top.key), !top.has_nan && top.key > kLowestKey};

  const bool limited = s.top_k > 0 && s.top_k < vocab;
  row.weigh(key_to_logit(top.key), s.scale, limited);
  return take(row, choose(row, s, random, limited ? s.top_k : 0), random);
}

}  // namespace gqa::sampling
