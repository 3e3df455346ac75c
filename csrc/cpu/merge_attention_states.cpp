// CPU twin of merge_attention_states. A row of work is one query token under one head.
#include <cmath>
#include <limits>

#include "cpu/types.h"
#include "plan/merge_attention_states.h"

namespace gqa::cpu {
namespace {

constexpr int64_t kChunk = 256;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Exactly 1 for the largest, also where that is infinite; NaN for NaN.
GQA_INLINE float weigh(float lse, float max) { return lse == max ? 1.0f : std::exp(lse - max); }

// out[d] = sum of weight * outs[part][d] / total, up to kChunk elements of one row.
template <typename T>
GQA_INLINE void merge_chunk(const gqa_merge_attention_states_params &p, const float *lses, float max, float total,
                            int64_t rows, int64_t at, int64_t count) {
  float sums[kChunk] = {};
  for (int64_t part = 0; part < p.parts; ++part) {
    const float lse = lses[part * rows];
    if (lse == -kInfinity) continue;  // saw no key: whatever its out holds counts for nothing
    const float weight = weigh(lse, max);
    const T *from = static_cast<const T *>(p.outs) + part * rows * p.head_dim + at;
    for (int64_t d = 0; d < count; ++d) sums[d] += weight * to_float(from[d]);
  }
  T *out = static_cast<T *>(p.out) + at;
  for (int64_t d = 0; d < count; ++d) out[d] = from_float<T>(sums[d] / total);
}

template <typename T>
GQA_INLINE void merge_row(const gqa_merge_attention_states_params &p, int64_t row) {
  const int64_t rows = p.batch * p.seqlen_q * p.num_q_heads;
  const int64_t token = row / p.num_q_heads, head = row % p.num_q_heads;
  const int64_t lse_row = (token / p.seqlen_q * p.num_q_heads + head) * p.seqlen_q + token % p.seqlen_q;
  const float *lses = p.lses + lse_row;
  float max = -kInfinity, total = 0;
  for (int64_t part = 0; part < p.parts; ++part) max = lses[part * rows] > max ? lses[part * rows] : max;
  for (int64_t part = 0; part < p.parts; ++part) {
    if (lses[part * rows] != -kInfinity) total += weigh(lses[part * rows], max);
  }
  p.lse[lse_row] = total == 0.0f ? -kInfinity : max + std::log(total);
  for (int64_t d = 0; d < p.head_dim; d += kChunk) {
    const int64_t count = p.head_dim - d < kChunk ? p.head_dim - d : kChunk;
    merge_chunk<T>(p, lses, max, total == 0.0f ? 1.0f : total, rows, row * p.head_dim + d, count);
  }
}

template <typename T>
GQA_CPU_CLONES void merge_rows(const gqa_merge_attention_states_params *p, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; ++row) merge_row<T>(*p, row);
}

}  // namespace
}  // namespace gqa::cpu

extern "C" gqa_status gqa_merge_attention_states_cpu(const gqa_merge_attention_states_params *p, int64_t first_row,
                                                     int64_t last_row) {
  GQA_RETURN_IF_ERROR(gqa::check_params(p));
  return gqa::cpu::dispatch_float(
      p->dtype, [&](auto tag) { gqa::cpu::merge_rows<typename decltype(tag)::type>(p, first_row, last_row); });
}
