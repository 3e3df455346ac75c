// CPU twin of sample: passes over a row in chunks, the arithmetic of common/sampling.h. Compiled without contraction.
#include "plan/sample.h"

#include <algorithm>

#include "common/sampling_draw.h"
#include "cpu/types.h"

namespace gqa::cpu {
namespace {

using namespace gqa::sampling;

constexpr int kGroup = 64;  // tokens looked at one by one, or passed over together
constexpr int kChunk = 8 * kGroup;
constexpr int kBanks = 4;  // of the histogram, so that neighbours in one bin need not wait for each other
constexpr int kListed = 2048;
constexpr int kDigitBits = 11;
constexpr uint64_t kOne = uint64_t{1} << 40;  // a cell counts above bit 40 and sums m below it

// The n logits from the start-th on, adjusted; then -inf up to a whole chunk.
template <typename T>
GQA_CPU_CLONES void load_chunk(const T *logits, const Adjustments<T> &by, int64_t start, int n, float *z) {
  for (int i = 0; i < n; ++i) z[i] = to_float(logits[start + i]);
  if (by.counts != nullptr) {
    const int32_t *counts = by.counts + start;
    const Penalties penalties = by.penalties;
    for (int first = 0; first < n; first += kGroup) {
      const int end = std::min(first + kGroup, n);
      int32_t any = 0;
      for (int i = first; i < end; ++i) any |= counts[i];
      if (any == 0) continue;
      for (int i = first; i < end; ++i) z[i] = penalize(z[i], counts[i], penalties);
    }
  }
  if (by.bias != nullptr) {
    by.with_bias([&](const auto *bias) {
      for (int i = 0; i < n; ++i) z[i] = add(z[i], to_float(bias[start + i]));
    });
  }
  for (int i = n; i < kChunk; ++i) z[i] = kForbidden;
  if (by.allowed != nullptr) {
    for (int first = 0; first < n; first += 32) {
      const uint32_t word = static_cast<uint32_t>(by.allowed[(start + first) / 32]);
      for (int i = 0; i < 32; ++i) z[first + i] = (word >> i & 1) != 0 ? z[first + i] : kForbidden;
    }
  }
}

// The bits of floats as integers that order alike, but for -0, just below 0, and NaN, beyond the infinities.
struct Ordered {
  int32_t least = INT32_MAX, largest = INT32_MIN;

  bool has_nan() const { return largest > 0x7f800000 || least < static_cast<int32_t>(0x807fffffu); }
  uint32_t largest_key() const { return key(from_bits(static_cast<uint32_t>(largest ^ (largest >> 31 & 0x7fffffff)))); }
};

GQA_CPU_CLONES Ordered order(const float *z) {
  Ordered range;
  for (int i = 0; i < kChunk; ++i) {
    const int32_t bits = static_cast<int32_t>(to_bits(z[i]));
    const int32_t ordered = bits ^ (bits >> 31 & 0x7fffffff);
    range.largest = std::max(range.largest, ordered);
    range.least = std::min(range.least, ordered);
  }
  return range;
}

GQA_CPU_CLONES void weigh_chunk(const float *z, float max, float scale, uint32_t *bins, uint32_t *m) {
  for (int i = 0; i < kChunk; ++i) {
    const Weight weight = sampling::weigh(exponent_of(z[i], max, scale));
    bins[i] = weight.bin;
    m[i] = weight.m;
  }
}

// The chunk's exponents; a bit for each group with one from low to high.
GQA_CPU_CLONES uint32_t find_exponents(const float *z, float max, float scale, float low, float high, float *t) {
  uint32_t found = 0;
  for (int group = 0; group < kChunk / kGroup; ++group) {
    uint32_t any = 0;
    for (int i = group * kGroup; i < (group + 1) * kGroup; ++i) {
      t[i] = exponent_of(z[i], max, scale);
      any |= static_cast<uint32_t>(t[i] >= low) & static_cast<uint32_t>(t[i] <= high);
    }
    found |= any << group;
  }
  return found;
}

GQA_CPU_CLONES void weigh_group(const float *t, uint32_t *bins, uint32_t *m) {
  for (int i = 0; i < kGroup; ++i) {
    const Weight weight = sampling::weigh(t[i]);
    bins[i] = weight.bin;
    m[i] = weight.m;
  }
}

struct Token {
  uint32_t key, m;
  float exponent;
  uint32_t index;
};

template <typename T>
class Row : public Filters<Row<T>> {
 public:
  Row(const gqa_sample_params &p, int64_t row)
      : logits_(static_cast<const T *>(p.logits) + row * p.logits_stride),
        vocab_(p.vocab),
        by_(load_adjustments<T>(p, row)) {}

  Top top() {
    Top top{0, false};
    for_each_chunk([&](const float *z, int64_t start, int n) {
      const Ordered range = order(z);
      uint32_t largest = range.has_nan() ? 0 : range.largest_key();
      if (range.has_nan()) {
        for (int i = 0; i < n; ++i) largest = std::max(largest, key(z[i]));
      }
      top.has_nan = top.has_nan || range.has_nan();
      if (largest <= top.key) return;
      top.key = largest;
      top_chunk_ = start;
    });
    return top;
  }

  int64_t first(uint32_t of) const {
    float z[kChunk];
    load(top_chunk_, z);
    int i = 0;
    while (key(z[i]) != of) ++i;
    return top_chunk_ + i;
  }

  void weigh(float max, float scale, bool) {
    max_ = max;
    scale_ = scale;
    uint64_t banks[(kBins + 1) * kBanks] = {};
    uint32_t bins[kChunk], m[kChunk];
    for_each_chunk([&](const float *z, int64_t, int) {
      weigh_chunk(z, max, scale, bins, m);
      for (int i = 0; i < kChunk; i += kBanks) {
        for (int bank = 0; bank < kBanks; ++bank) banks[bins[i + bank] * kBanks + bank] += kOne | m[i + bank];
      }
    });
    for (uint32_t bin = 0; bin < kBins; ++bin) {
      cells_[bin] = 0;
      for (int bank = 0; bank < kBanks; ++bank) cells_[bin] += banks[bin * kBanks + bank];
      if (cells_[bin] != 0) bins_ = bin + 1;
    }
  }

  uint64_t sum(uint32_t bin) const { return cells_[bin] % kOne; }
  uint64_t count(uint32_t bin) const { return cells_[bin] / kOne; }

  template <typename F>
  uint64_t total(F &&weight) const {
    uint64_t sum = 0;
    for (uint32_t bin = 0; bin < bins_; ++bin) sum += weight(bin);
    return sum;
  }

  template <typename F>
  Found find(F &&weight, uint64_t need) const {
    Found found{0, 0};
    for (uint64_t next; (next = found.before + weight(found.bin)) < need; ++found.bin) found.before = next;
    return found;
  }

  // The bin's keys lie between bounds a little wider than its exponents. Of the key's distance from the lower one,
  // eleven bits at a time, from the top: a histogram of the digit, walked down from its largest value.
  uint32_t select(uint32_t bin, bool by_count, uint64_t need) {
    const float eighth = div(0.125f, scale_), at = static_cast<float>(bin);
    const uint32_t low = key(sub(max_, mul(mul(at + 0.5f, eighth), 1.000002f))) - 2;
    const uint32_t high = key(sub(max_, mul(mul(at - 0.5f, eighth), 0.999998f))) + 2;
    const auto weight = [&](uint64_t cell) { return by_count ? cell / kOne : cell % kOne; };
    int left = 1;
    while (left < 32 && (high - low) >> left != 0) ++left;
    uint32_t prefix = 0;
    uint64_t above = 0, within = 0;
    while (left > 0) {
      const int take = std::min(kDigitBits, left);
      const int shift = left - take;
      uint64_t cells[1 << kDigitBits] = {};
      for_each_in(bin, [&](const Token &token) {
        const uint32_t digits = (token.key - low) >> shift;
        if (digits >> take == prefix) cells[digits % (1u << take)] += kOne | token.m;
      });
      uint32_t digit = (1u << take) - 1;
      for (; weight(cells[digit]) < need; --digit) {
        need -= weight(cells[digit]);
        above += cells[digit];
      }
      within = cells[digit];
      prefix = prefix << take | digit;
      left = shift;
    }
    selected_ = {bin, prefix + low, (above + within) % kOne};
    return selected_.key;
  }

  uint64_t kept_sum(const Kept &kept) {
    if (kept.bin == selected_.bin && kept.key == selected_.key && kept.exponent == Kept{}.exponent) {
      return selected_.sum;
    }
    uint64_t sum = 0;
    for_each_in(kept.bin, [&](const Token &token) {
      if (kept.holds(kept.bin, token.key, token.exponent)) sum += token.m;
    });
    return sum;
  }

  Picked pick(const Kept &kept, uint32_t bin, uint64_t need) {
    Picked picked{0, 0};
    uint64_t sum = 0;
    for_each_in(bin, [&](const Token &token) {
      if (sum >= need || !kept.holds(bin, token.key, token.exponent)) return;
      sum += token.m;
      picked = {token.index, token.m};
    });
    return picked;
  }

 private:
  int load(int64_t start, float *z) const {
    const int n = static_cast<int>(std::min<int64_t>(kChunk, vocab_ - start));
    load_chunk(logits_, by_, start, n, z);
    return n;
  }

  // f(z, start, n): a whole chunk of logits, of which n are tokens, the start-th and so on.
  template <typename F>
  GQA_INLINE void for_each_chunk(F &&f) const {
    float z[kChunk];
    for (int64_t start = 0; start < vocab_; start += kChunk) f(z, start, load(start, z));
  }

  // f(token) for the tokens of a bin, by index. The last bin of few tokens is kept as a list.
  template <typename F>
  GQA_INLINE void for_each_in(uint32_t bin, F &&f) {
    if (count(bin) > kListed) return scan(bin, f);
    if (bin != listed_bin_) {
      listed_bin_ = bin;
      listed_ = 0;
      scan(bin, [&](const Token &token) { list_[listed_++] = token; });
    }
    for (int i = 0; i < listed_; ++i) f(list_[i]);
  }

  template <typename F>
  GQA_INLINE void scan(uint32_t bin, F &&f) const {
    const float middle = -0.125f * static_cast<float>(bin);
    float t[kChunk];
    uint32_t bins[kGroup], m[kGroup];
    for_each_chunk([&](const float *z, int64_t start, int) {
      uint32_t found = find_exponents(z, max_, scale_, middle - 0.0625f, middle + 0.0625f, t);
      for (int first = 0; found != 0; first += kGroup, found >>= 1) {
        if ((found & 1) == 0) continue;
        weigh_group(t + first, bins, m);
        int members[kGroup], count = 0;
        for (int i = 0; i < kGroup; ++i) {
          members[count] = i;
          count += bins[i] == bin;
        }
        for (int j = 0; j < count; ++j) {
          const int i = members[j];
          f(Token{key(z[first + i]), m[i], t[first + i], static_cast<uint32_t>(start + first + i)});
        }
      }
    });
  }

  struct Selected {
    uint32_t bin = kBins, key = 0;
    uint64_t sum = 0;
  };

  const T *logits_;
  int64_t vocab_;
  Adjustments<T> by_;
  int64_t top_chunk_ = 0;
  float max_ = 0, scale_ = 0;
  Selected selected_;
  uint32_t bins_ = 0;  // bins from here on are empty
  uint32_t listed_bin_ = kBins;
  int listed_ = 0;
  uint64_t cells_[kBins];
  Token list_[kListed];
};

template <typename T>
void sample_rows(const gqa_sample_params *p, int64_t first, int64_t last) {
  const Settings of_call = settings_of(*p);
  for (int64_t i = first; i < last; ++i) {
    Row<T> row(*p, i);
    const Drawn drawn = draw(row, load_settings(*p, of_call, i), load_random(*p, i), p->vocab);
    p->ids[i] = drawn.id;
    if (p->valid != nullptr) p->valid[i] = drawn.valid;
    if (p->logprob != nullptr) p->logprob[i] = drawn.logprob();
  }
}

}  // namespace
}  // namespace gqa::cpu

extern "C" gqa_status gqa_sample_cpu(const gqa_sample_params *p, int64_t first_row, int64_t last_row) {
  GQA_RETURN_IF_ERROR(gqa::check_params(p));
  return gqa::cpu::dispatch_float(
      p->dtype, [&](auto tag) { gqa::cpu::sample_rows<typename decltype(tag)::type>(p, first_row, last_row); });
}
