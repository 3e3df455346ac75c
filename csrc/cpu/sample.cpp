// CPU twin of sample: plain loops over a row, the arithmetic of common/sampling.h. Compiled without contraction.
#include "plan/sample.h"

#include <algorithm>

#include "common/sampling_draw.h"
#include "cpu/types.h"

namespace gqa::cpu {
namespace {

using namespace gqa::sampling;

constexpr int64_t kChunk = 512;
constexpr int kDigitBits = 11;
constexpr uint64_t kOne = uint64_t{1} << 40;  // a cell counts above bit 40 and sums m below it

// A chunk's tokens as the passes want them.
struct Chunk {
  uint32_t key[kChunk];
  float exponent[kChunk];
  uint32_t bin[kChunk];
  uint32_t m[kChunk];
};

template <typename T>
GQA_CPU_CLONES void weigh_chunk(const T *z, int64_t n, float max, float scale, Chunk *chunk) {
  for (int64_t i = 0; i < n; ++i) {
    const float value = to_float(z[i]);
    const float t = exponent_of(value, max, scale);
    const Weight weight = sampling::weigh(t);
    chunk->key[i] = key(value);
    chunk->exponent[i] = t;
    chunk->bin[i] = weight.bin;
    chunk->m[i] = weight.m;
  }
}

struct KeyRange {
  uint32_t largest, smallest;
};

template <typename T>
GQA_CPU_CLONES KeyRange key_range(const T *z, int64_t n) {
  KeyRange range{0, ~0u};
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t of = key(to_float(z[i]));
    range.largest = of > range.largest ? of : range.largest;
    range.smallest = of < range.smallest ? of : range.smallest;
  }
  return range;
}

template <typename T>
class Row : public Filters<Row<T>> {
 public:
  Row(const T *z, int64_t vocab) : z_(z), vocab_(vocab) {}

  Top top() const {
    const KeyRange range = key_range(z_, vocab_);
    return {range.largest, range.smallest == 0};
  }

  int64_t first(uint32_t of) const {
    int64_t index = 0;
    while (key(to_float(z_[index])) != of) ++index;
    return index;
  }

  void weigh(float max, float scale, bool) {
    max_ = max;
    scale_ = scale;
    std::fill(cells_, cells_ + kBins + 1, 0);
    for_each([&](const Chunk &chunk, int64_t i, int64_t) { cells_[chunk.bin[i]] += kOne | chunk.m[i]; });
    bins_ = kBins;
    while (cells_[bins_ - 1] == 0) --bins_;
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

  // Eleven bits of the key at a time, from the top: a histogram of the digit, walked down from its largest value.
  uint32_t select(uint32_t bin, bool by_count, uint64_t need) const {
    uint32_t prefix = 0;
    for (int left = 32; left > 0;) {
      const int take = std::min(kDigitBits, left);
      const int shift = left - take;
      uint64_t cells[1 << kDigitBits] = {};
      for_each([&](const Chunk &chunk, int64_t i, int64_t) {
        const uint64_t digits = chunk.key[i] >> shift;
        if (chunk.bin[i] != bin || digits >> take != prefix) return;
        cells[digits % (1 << take)] += by_count ? 1 : chunk.m[i];
      });
      uint32_t digit = (1 << take) - 1;
      for (; cells[digit] < need; --digit) need -= cells[digit];
      prefix = prefix << take | digit;
      left = shift;
    }
    return prefix;
  }

  uint64_t kept_sum(const Kept &kept) const {
    uint64_t sum = 0;
    for_each([&](const Chunk &chunk, int64_t i, int64_t) {
      if (chunk.bin[i] == kept.bin && kept.holds(chunk.bin[i], chunk.key[i], chunk.exponent[i])) sum += chunk.m[i];
    });
    return sum;
  }

  Picked pick(const Kept &kept, uint32_t bin, uint64_t need) const {
    Picked picked{0, 0};
    uint64_t sum = 0;
    for_each([&](const Chunk &chunk, int64_t i, int64_t index) {
      if (chunk.bin[i] != bin || !kept.holds(bin, chunk.key[i], chunk.exponent[i]) || sum >= need) return;
      sum += chunk.m[i];
      picked = {index, chunk.m[i]};
    });
    return picked;
  }

 private:
  // f(chunk, i, index): the chunk's i-th token is the row's index-th.
  template <typename F>
  GQA_INLINE void for_each(F &&f) const {
    Chunk chunk;
    for (int64_t start = 0; start < vocab_; start += kChunk) {
      const int64_t n = std::min(kChunk, vocab_ - start);
      weigh_chunk(z_ + start, n, max_, scale_, &chunk);
      for (int64_t i = 0; i < n; ++i) f(chunk, i, start + i);
    }
  }

  const T *z_;
  int64_t vocab_;
  float max_ = 0, scale_ = 0;
  uint32_t bins_ = 0;  // bins from here on are empty
  uint64_t cells_[kBins + 1];
};

template <typename T>
void sample_rows(const gqa_sample_params *p, int64_t first, int64_t last) {
  const Settings of_call = settings_of(*p);
  for (int64_t i = first; i < last; ++i) {
    Row<T> row(static_cast<const T *>(p->logits) + i * p->logits_stride, p->vocab);
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
