// CPU twin of attention, prefill and decode: online softmax in float32 over blocks of 64 keys (FlashAttention-2).
//
// A row of work is a KV head of one sequence and a block of its query tokens. Its (token, query head) queries are taken
// 32 at a time, so that one conversion of a key block to float serves them all. A query's arithmetic depends on its own
// query and keys alone, and key blocks start at multiples of 64: the same bytes in any batch, chunk or page order.
#include "plan/gqa_attention.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/kv_cache_append.h"
#include "cpu/math.h"

namespace gqa::cpu {
namespace {

constexpr int64_t kMaxHeadDim = 256;
constexpr int kQueries = 32;
constexpr int kKeys = 64;
constexpr int kLanes = 16;  // independent sums, for vector units
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// One query token under one query head.
struct Query {
  int64_t token, head;
  KeyRange keys;
  float max, sum;
};

struct Scratch {
  alignas(64) float q[kQueries * kMaxHeadDim];
  alignas(64) float out[kQueries * kMaxHeadDim];  // unnormalised
  alignas(64) float k[kKeys * kMaxHeadDim];       // [D, key]
  alignas(64) float v[kKeys * kMaxHeadDim];       // [key, D]; holds the keys before they are transposed
  alignas(64) float scores[kQueries * kKeys];
  Query queries[kQueries];
};

// The sequence and KV head that a row of work is about.
struct Work {
  const gqa_attention_params &p;
  Sequence s;
  int64_t b, kv_head;
  bool ragged;

  int64_t group() const { return p.num_q_heads / p.num_kv_heads; }
};

GQA_INLINE int64_t q_offset(const Work &w, const int64_t *stride, int64_t token, int64_t head) {
  return (w.ragged ? 0 : w.b * stride[0]) + (w.s.q_start + token) * stride[1] + head * stride[2];
}

GQA_INLINE void store_lse(const Work &w, int64_t token, int64_t head, float value) {
  if (w.p.lse == nullptr) return;
  const int64_t row = w.ragged ? head * w.p.total_q + w.s.q_start : (w.b * w.p.num_q_heads + head) * w.p.seqlen_q;
  w.p.lse[row + token] = value;
}

// Tokens [first, last) without an answer of their own: all heads of the group get `out` and `lse`.
template <typename T>
GQA_INLINE void fill_tokens(const Work &w, int64_t first, int64_t last, float out, float lse) {
  for (int64_t token = first; token < last; ++token) {
    for (int64_t head = w.kv_head * w.group(); head < (w.kv_head + 1) * w.group(); ++head) {
      T *row = static_cast<T *>(w.p.out) + q_offset(w, w.p.out_stride, token, head);
      for (int64_t i = 0; i < w.p.head_dim; ++i) row[i] = from_float<T>(out);
      store_lse(w, token, head, lse);
    }
  }
}

template <typename T>
GQA_INLINE void to_floats(const T *x, float *out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = to_float(x[i]);
}

template <typename T>
GQA_INLINE void load_query(const Work &w, int64_t token, int64_t head, float *out) {
  const T *q = static_cast<const T *>(w.p.q) + q_offset(w, w.p.q_stride, token, head);
  T buffer[kMaxHeadDim];
  if (w.p.rotary.cos != nullptr) {
    const int64_t offset =
        rotary_offset(w.p.rotary, w.ragged ? 0 : w.b, w.s.q_start + token, w.s.position(token) - w.s.leftpad);
    rotate_head(w.p.rotary, offset, q, buffer, w.p.head_dim);
    q = buffer;
  }
  to_floats(q, out, w.p.head_dim);
}

// Where key or value `row` is cached; -1 where the block table names no page, also for a new one, whose write is
// dropped.
template <bool kKey>
GQA_INLINE int64_t cached_at(const Work &w, int64_t row) {
  const auto &p = w.p;
  return p.k_cache == nullptr ? 0 : cache_offset(p, kKey ? p.k_cache_stride : p.v_cache_stride, w.b, row, w.kv_head);
}

// New key or value i, a key rotated.
template <typename T, bool kKey>
GQA_INLINE const T *find_new(const Work &w, int64_t i, T *buffer) {
  const auto &p = w.p;
  const T *from = kKey ? new_row<T>(p.k, p.k_stride, w.ragged, w.s, w.b, i, w.kv_head)
                       : new_row<T>(p.v, p.v_stride, w.ragged, w.s, w.b, i, w.kv_head);
  if (!kKey || p.rotary.cos == nullptr) return from;
  rotate_head(p.rotary, new_rotary_offset(p, w.ragged, w.s, w.b, i), from, buffer, p.head_dim);
  return buffer;
}

// Key or value `row`, whose place in the cache is `at`, as floats: of a quantised cache what the cache makes of it.
template <typename T, bool kKey>
GQA_INLINE void load_row(const Work &w, int64_t row, int64_t at, float *out) {
  const auto &p = w.p;
  const void *cache = kKey ? p.k_cache : p.v_cache;
  const int64_t i = row - w.s.cached;
  T buffer[kMaxHeadDim];
  if (p.quantization.dtype == 0) {
    return to_floats(i < 0 ? static_cast<const T *>(cache) + at : find_new<T, kKey>(w, i, buffer), out, p.head_dim);
  }
  const float scale = kKey ? k_scale_of(p.quantization, w.kv_head) : v_scale_of(p.quantization, w.kv_head);
  uint8_t bytes[kMaxHeadDim];
  const uint8_t *stored = static_cast<const uint8_t *>(cache) + at;
  if (i >= 0) {
    quantize_row(p.quantization.dtype, find_new<T, kKey>(w, i, buffer), scale, bytes, p.head_dim);
    stored = bytes;
  }
  for (int64_t d = 0; d < p.head_dim; ++d) out[d] = stored_value(p.quantization.dtype, stored[d]) * scale;
}

// Rows [first, last) of the key block at `base` as floats; the block's other rows are zero and never used.
template <typename T, bool kKey>
GQA_INLINE void load_rows(const Work &w, int64_t base, int64_t first, int64_t last, float *out) {
  const int64_t head_dim = w.p.head_dim;
  for (int64_t row = base; row < base + kKeys; ++row, out += head_dim) {
    const bool wanted = row >= first && row < last;
    const int64_t at = wanted ? cached_at<kKey>(w, row) : -1;
    if (at >= 0) {
      load_row<T, kKey>(w, row, at, out);
    } else {
      std::fill(out, out + head_dim, wanted ? kNan : 0.0f);
    }
  }
}

// [key, D] to [D, key], in strips of 16 keys that a compiler can hold in registers.
GQA_INLINE void transpose(const float *rows, float *columns, int64_t head_dim) {
  for (int strip = 0; strip < kKeys; strip += kLanes) {
    const float *from = rows + strip * head_dim;
    for (int64_t d = 0; d < head_dim; ++d) {
      for (int j = 0; j < kLanes; ++j) columns[d * kKeys + strip + j] = from[j * head_dim + d];
    }
  }
}

// q . k for all keys of the block side by side, eight dimensions at a time.
GQA_INLINE void dot_keys(const float *q, const float *columns, int64_t head_dim, float *__restrict scores) {
  std::fill(scores, scores + kKeys, 0.0f);
  for (int64_t d = 0; d < head_dim; d += 8, q += 8) {
    const float *k = columns + d * kKeys;
    const float q0 = q[0], q1 = q[1], q2 = q[2], q3 = q[3], q4 = q[4], q5 = q[5], q6 = q[6], q7 = q[7];
    for (int j = 0; j < kKeys; ++j) {
      const float low = (q0 * k[j] + q1 * k[j + kKeys]) + (q2 * k[j + 2 * kKeys] + q3 * k[j + 3 * kKeys]);
      const float high =
          (q4 * k[j + 4 * kKeys] + q5 * k[j + 5 * kKeys]) + (q6 * k[j + 6 * kKeys] + q7 * k[j + 7 * kKeys]);
      scores[j] += low + high;
    }
  }
}

// Scores of the query's keys [first, last) of the block; -inf elsewhere, so that masked keys weigh exactly nothing.
GQA_INLINE void score_keys(const gqa_attention_params &p, const float *q, const float *columns, int64_t first,
                           int64_t last, float *scores) {
  dot_keys(q, columns, p.head_dim, scores);
  for (int j = 0; j < kKeys; ++j) scores[j] *= p.softmax_scale;
  if (p.softcap > 0) {
    for (int64_t j = first; j < last; ++j) scores[j] = p.softcap * std::tanh(scores[j] / p.softcap);
  }
  std::fill(scores, scores + first, -kInfinity);
  std::fill(scores + last, scores + kKeys, -kInfinity);
}

// Turns scores into weights relative to the new maximum; returns the factor for what was summed before.
GQA_INLINE float update_softmax(Query *query, float *scores) {
  float lanes[kLanes];
  for (int j = 0; j < kLanes; ++j) lanes[j] = -kInfinity;
  for (int at = 0; at < kKeys; at += kLanes) {
    for (int j = 0; j < kLanes; ++j) lanes[j] = scores[at + j] > lanes[j] ? scores[at + j] : lanes[j];
  }
  float max = query->max;
  for (int j = 0; j < kLanes; ++j) max = lanes[j] > max ? lanes[j] : max;
  const float base = max == -kInfinity ? 0.0f : max;
  for (int j = 0; j < kLanes; ++j) lanes[j] = 0;
  for (int at = 0; at < kKeys; at += kLanes) {
    for (int j = 0; j < kLanes; ++j) {
      scores[at + j] = vector_exp(scores[at + j] - base);
      lanes[j] += scores[at + j];
    }
  }
  float sum = 0;
  for (int j = 0; j < kLanes; ++j) sum += lanes[j];
  const float factor = query->max == max ? 1.0f : vector_exp(query->max - base);
  query->sum = query->sum * factor + sum;
  query->max = max;
  return factor;
}

// out = out * factor + weights . v over keys [first, last): masked values are never touched.
GQA_INLINE void add_values(const float *weights, const float *v, int64_t first, int64_t last, int64_t head_dim,
                           float factor, float *__restrict out) {
  if (factor != 1.0f) {
    for (int64_t d = 0; d < head_dim; ++d) out[d] *= factor;
  }
  int64_t j = first;
  for (; j + 8 <= last; j += 8) {
    const float *w = weights + j, *a = v + j * head_dim, *b = a + 4 * head_dim;
    const float w0 = w[0], w1 = w[1], w2 = w[2], w3 = w[3], w4 = w[4], w5 = w[5], w6 = w[6], w7 = w[7];
    for (int64_t d = 0; d < head_dim; ++d) {
      const float low = (w0 * a[d] + w1 * a[d + head_dim]) + (w2 * a[d + 2 * head_dim] + w3 * a[d + 3 * head_dim]);
      const float high = (w4 * b[d] + w5 * b[d + head_dim]) + (w6 * b[d + 2 * head_dim] + w7 * b[d + 3 * head_dim]);
      out[d] += low + high;
    }
  }
  for (; j < last; ++j) {
    for (int64_t d = 0; d < head_dim; ++d) out[d] += weights[j] * v[j * head_dim + d];
  }
}

GQA_INLINE float load_sink(const gqa_attention_params &p, int64_t head) {
  if (p.sinks == nullptr) return -kInfinity;
  switch (p.sinks_dtype) {
    case GQA_DTYPE_FLOAT16: return to_float(static_cast<const float16 *>(p.sinks)[head]);
    case GQA_DTYPE_BFLOAT16: return to_float(static_cast<const bfloat16 *>(p.sinks)[head]);
    default: return static_cast<const float *>(p.sinks)[head];
  }
}

template <typename T>
GQA_INLINE void start_query(const Work &w, int64_t token, int64_t head, Query *query, float *q, float *out) {
  // A sink is a key of weight exp(sink) and value 0.
  const float sink = load_sink(w.p, head);
  *query = {token, head, key_range(w.p, w.s, token), sink, sink == -kInfinity ? 0.0f : 1.0f};
  load_query<T>(w, token, head, q);
  std::fill(out, out + w.p.head_dim, 0.0f);
}

template <typename T>
GQA_INLINE void finish_query(const Work &w, const Query &query, const float *sums) {
  T *out = static_cast<T *>(w.p.out) + q_offset(w, w.p.out_stride, query.token, query.head);
  const float sum = query.sum == 0.0f ? 1.0f : query.sum;  // no key: zeros stay zeros
  for (int64_t d = 0; d < w.p.head_dim; ++d) out[d] = from_float<T>(sums[d] / sum);
  store_lse(w, query.token, query.head, query.sum == 0.0f ? -kInfinity : query.max + std::log(query.sum));
}

// Pairs [first, last) of a block, query i being token i / group under the group's head i % group.
template <typename T>
GQA_INLINE void attend(const Work &w, int64_t first, int64_t last, Scratch *scratch) {
  const int64_t head_dim = w.p.head_dim, count = last - first;
  int64_t from = std::numeric_limits<int64_t>::max(), to = 0;
  for (int64_t i = 0; i < count; ++i) {
    Query &query = scratch->queries[i];
    start_query<T>(w, (first + i) / w.group(), w.kv_head * w.group() + (first + i) % w.group(), &query,
                   scratch->q + i * head_dim, scratch->out + i * head_dim);
    if (query.keys.first >= query.keys.last) continue;
    from = std::min(from, query.keys.first);
    to = std::max(to, query.keys.last);
  }
  for (int64_t base = from / kKeys * kKeys; base < to; base += kKeys) {
    load_rows<T, true>(w, base, from, to, scratch->v);
    transpose(scratch->v, scratch->k, head_dim);
    load_rows<T, false>(w, base, from, to, scratch->v);
    for (int64_t i = 0; i < count; ++i) {
      Query &query = scratch->queries[i];
      const int64_t low = std::max(query.keys.first - base, int64_t{0});
      const int64_t high = std::min(query.keys.last - base, int64_t{kKeys});
      if (low >= high) continue;
      float *scores = scratch->scores + i * kKeys;
      score_keys(w.p, scratch->q + i * head_dim, scratch->k, low, high, scores);
      const float factor = update_softmax(&query, scores);
      add_values(scores, scratch->v, low, high, head_dim, factor, scratch->out + i * head_dim);
    }
  }
  for (int64_t i = 0; i < count; ++i) finish_query<T>(w, scratch->queries[i], scratch->out + i * head_dim);
}

template <typename T>
GQA_CPU_CLONES void attention_rows(const gqa_attention_params *p, int64_t first, int64_t last) {
  Scratch scratch;
  const int64_t blocks = cpu_query_blocks(p);
  for (int64_t row = first; row < last; ++row) {
    // Long and short causal blocks in turn, so that every range of rows is about as much work as another.
    const int64_t turn = row % blocks, block = turn % 2 == 0 ? turn / 2 : blocks - 1 - turn / 2;
    const int64_t b = row / blocks / p->num_kv_heads;
    Work w{*p, {}, b, row / blocks % p->num_kv_heads, p->cu_seqlens_q.data != nullptr};
    const int64_t begin = block * kCpuQueryBlock;
    if (b == p->batch) {
      w.s.q_start = ragged_tail(*p);
      const int64_t tail = p->total_q - w.s.q_start;
      fill_tokens<T>(w, begin, block + 1 == blocks ? tail : std::min(begin + kCpuQueryBlock, tail), 0.0f, -kInfinity);
      continue;
    }
    w.s = load_sequence(*p, b);
    const int64_t end = block + 1 == blocks ? w.s.q_len : std::min(begin + kCpuQueryBlock, w.s.q_len);
    if (!w.s.valid) {
      fill_tokens<T>(w, begin, end, kNan, kNan);
      continue;
    }
    // Other blocks read new keys from k and v, never from the cache, so this write races with nobody.
    for (int64_t i = 0; block == 0 && p->k_cache != nullptr && i < w.s.k_len; ++i) {
      append_row<T>(*p, w.ragged, w.s, b, i, w.kv_head);
    }
    for (int64_t at = begin * w.group(); at < end * w.group(); at += kQueries) {
      attend<T>(w, at, std::min(at + kQueries, end * w.group()), &scratch);
    }
  }
}

gqa_status run(const gqa_attention_params *p, int64_t first_row, int64_t last_row) {
  return dispatch_float(p->dtype,
                        [&](auto tag) { attention_rows<typename decltype(tag)::type>(p, first_row, last_row); });
}

}  // namespace
}  // namespace gqa::cpu

extern "C" {

gqa_status gqa_attention_prefill_cpu(const gqa_attention_prefill_params *p, int64_t first_row, int64_t last_row) {
  GQA_RETURN_IF_ERROR(gqa::check_attention_prefill(p));
  return gqa::cpu::run(p, first_row, last_row);
}

gqa_status gqa_attention_decode_cpu(const gqa_attention_decode_params *p, int64_t first_row, int64_t last_row) {
  GQA_RETURN_IF_ERROR(gqa::check_attention_decode(p));
  return gqa::cpu::run(p, first_row, last_row);
}

}  // extern "C"
