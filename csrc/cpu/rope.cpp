// CPU twin of rope: products in float32, rounded once to the dtype.
#include "plan/rope.h"

#include <limits>

#include "common/attention.h"
#include "common/rotate.h"
#include "cpu/types.h"

namespace gqa::cpu {
namespace {

constexpr int kLanes = 32;

// Angles of up to kLanes pairs, read once and used for every head.
struct Angles {
  float cosine[kLanes], sine[kLanes];
};

template <typename C>
GQA_INLINE Angles load_angles(const gqa_rotary &r, int64_t offset, int64_t pair, int count) {
  Angles angles;
  const C *cosine = static_cast<const C *>(r.cos) + offset + pair,
          *sine = static_cast<const C *>(r.sin) + offset + pair;
  for (int i = 0; i < count; ++i) angles.cosine[i] = to_float(cosine[i]);
  for (int i = 0; i < count; ++i) angles.sine[i] = to_float(sine[i]);
  return angles;
}

// Rotates pairs [pair, pair + count) of one head. Everything is read before anything is written: out may be x.
// A compile-time count of kLanes lets the loops vectorise.
template <bool kInterleaved, typename T>
GQA_INLINE void rotate_head(const T *x, T *out, const Angles &angles, int64_t pair, int64_t half, int count) {
  constexpr int kStep = kInterleaved ? 2 : 1;
  const int64_t first = kInterleaved ? 2 * pair : pair, second = kInterleaved ? 2 * pair + 1 : pair + half;
  T low[kLanes], high[kLanes];
  for (int i = 0; i < count; ++i) {
    const Pair rotated =
        rotate_pair(to_float(x[first + i * kStep]), to_float(x[second + i * kStep]), angles.cosine[i], angles.sine[i]);
    low[i] = from_float<T>(rotated.first);
    high[i] = from_float<T>(rotated.second);
  }
  for (int i = 0; i < count; ++i) {
    out[first + i * kStep] = low[i];
    out[second + i * kStep] = high[i];
  }
}

template <bool kInterleaved, typename T, typename C>
GQA_INLINE void rotate_heads(const gqa_rotary &r, int64_t offset, const T *x, T *out, int64_t heads, int64_t stride,
                             int64_t out_stride) {
  const int64_t half = r.dim / 2;
  Angles invalid;
  for (float &value : invalid.cosine) value = std::numeric_limits<float>::quiet_NaN();
  for (float &value : invalid.sine) value = std::numeric_limits<float>::quiet_NaN();
  for (int64_t pair = 0; pair < half; pair += kLanes) {
    const int count = static_cast<int>(half - pair < kLanes ? half - pair : kLanes);
    if (count == kLanes) {
      const Angles angles = offset < 0 ? invalid : load_angles<C>(r, offset, pair, kLanes);
      for (int64_t head = 0; head < heads; ++head) {
        rotate_head<kInterleaved>(x + head * stride, out + head * out_stride, angles, pair, half, kLanes);
      }
    } else {
      const Angles angles = offset < 0 ? invalid : load_angles<C>(r, offset, pair, count);
      for (int64_t head = 0; head < heads; ++head) {
        rotate_head<kInterleaved>(x + head * stride, out + head * out_stride, angles, pair, half, count);
      }
    }
  }
}

template <typename T>
GQA_INLINE void copy_rest(const gqa_rotary &r, int32_t head_dim, const T *x, T *out, int64_t heads, int64_t stride,
                          int64_t out_stride) {
  if (x == out || r.dim == head_dim) return;
  for (int64_t head = 0; head < heads; ++head) {
    std::memcpy(out + head * out_stride + r.dim, x + head * stride + r.dim, (head_dim - r.dim) * sizeof(T));
  }
}

template <typename T, typename C>
GQA_INLINE void rotate_token(const gqa_rotary &r, int32_t head_dim, int64_t offset, const T *x, T *out, int64_t heads,
                             int64_t stride, int64_t out_stride) {
  if (r.interleaved) {
    rotate_heads<true, T, C>(r, offset, x, out, heads, stride, out_stride);
  } else {
    rotate_heads<false, T, C>(r, offset, x, out, heads, stride, out_stride);
  }
  copy_rest(r, head_dim, x, out, heads, stride, out_stride);
}

template <typename T>
GQA_INLINE T *token_at(const void *base, const int64_t *stride, int64_t b, int64_t s) {
  return static_cast<T *>(const_cast<void *>(base)) + b * stride[0] + s * stride[1];
}

template <typename T, typename C>
GQA_CPU_CLONES void rope_rows(const gqa_rope_params *p, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; ++row) {
    const int64_t b = row / p->seqlen, s = row % p->seqlen;
    const int64_t offset = rotary_offset(p->rotary, b, s, s);
    rotate_token<T, C>(p->rotary, p->head_dim, offset, token_at<T>(p->q, p->q_stride, b, s),
                       token_at<T>(p->q_out, p->q_out_stride, b, s), p->num_q_heads, p->q_stride[2],
                       p->q_out_stride[2]);
    if (p->k == nullptr) continue;
    rotate_token<T, C>(p->rotary, p->head_dim, offset, token_at<T>(p->k, p->k_stride, b, s),
                       token_at<T>(p->k_out, p->k_out_stride, b, s), p->num_kv_heads, p->k_stride[2],
                       p->k_out_stride[2]);
  }
}

}  // namespace
}  // namespace gqa::cpu

extern "C" gqa_status gqa_rope_cpu(const gqa_rope_params *p, int64_t first_row, int64_t last_row) {
  GQA_RETURN_IF_ERROR(gqa::check_params(p));
  return gqa::cpu::dispatch_float(p->dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (p->rotary.dtype == p->dtype) {
      gqa::cpu::rope_rows<T, T>(p, first_row, last_row);
    } else {
      gqa::cpu::rope_rows<T, float>(p, first_row, last_row);
    }
  });
}
