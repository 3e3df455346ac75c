// What sample() computes, exactly. The CPU twin and the CUDA kernels share this arithmetic: each float step is one
// rounded operation and all that follows is integers, so the same logits, settings, seed and offset give the same
// token on every device, alone or in any batch. Files that include it must not contract a * b + c.
//
//   z_i     the logit as float32 after, where given and in this order, each step one rounded operation:
//             penalties     of a token that occurs: z / repetition if z > 0, else z * repetition; then, if its count
//                           is above 0, z - (frequency * count), then z - presence
//             bias          z + bias
//             bitmask       -inf where the token's bit is 0
//   t_i     (z_i - max z) * log2(e) / temperature: 2^t_i is the token's probability relative to the likeliest one's.
//           Below -43.75, or where z_i is -inf, the token is excluded: it is never drawn.
//   bin_i   -t_i in eighths of an octave, rounded; m_i = 2^19 * 2^(t_i + bin_i / 8), rounded to 20 bits
//   mass    of a bin: floor((sum of its m_i) * 2^(24 - bin / 8)), from an exact sum, so any order gives the same
//   filters each keeps the tokens above a threshold, ties included: top-k, then top-p of what top-k kept, then min-p
//   draw    a bin by its kept mass, bins from 0 up; then a token by m among the bin's kept ones, by index
#pragma once

#include <cmath>
#include <cstring>
#include <limits>

#include "common/index.h"

namespace gqa::sampling {

constexpr uint32_t kBins = 351;
constexpr uint32_t kExcluded = kBins;                  // the bin of tokens without mass
constexpr int64_t kMaxVocab = 1 << 18;                 // keeps every product of a sum and a scale below 2^63
constexpr uint32_t kLeastM = 502060, kMostM = 547500;  // of any token with mass
constexpr uint64_t kTopPOff = uint64_t{1} << 32;
constexpr uint32_t kInfinityKey = 0xff800000u;  // key() of +inf
constexpr uint32_t kLowestKey = 0x007fffffu;    // key() of -inf; only NaN, whose key is 0, lies below
constexpr float kForbidden = -std::numeric_limits<float>::infinity();

#if defined(__CUDA_ARCH__)
__device__ __forceinline__ float add(float a, float b) { return __fadd_rn(a, b); }
__device__ __forceinline__ float sub(float a, float b) { return __fsub_rn(a, b); }
__device__ __forceinline__ float mul(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ float div(float a, float b) { return __fdiv_rn(a, b); }
__device__ __forceinline__ uint64_t mul_high(uint64_t a, uint64_t b) { return __umul64hi(a, b); }
#else
GQA_HOST_DEVICE float add(float a, float b) { return a + b; }
GQA_HOST_DEVICE float sub(float a, float b) { return a - b; }
GQA_HOST_DEVICE float mul(float a, float b) { return a * b; }
GQA_HOST_DEVICE float div(float a, float b) { return a / b; }
GQA_HOST_DEVICE uint64_t mul_high(uint64_t a, uint64_t b) {
  __extension__ using Wide = unsigned __int128;
  return static_cast<uint64_t>(static_cast<Wide>(a) * b >> 64);
}
#endif

GQA_HOST_DEVICE uint32_t to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

GQA_HOST_DEVICE float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// An unsigned integer that orders as the logit does; -0 counts as 0. Of NaN: 0.
GQA_HOST_DEVICE uint32_t key(float z) {
  uint32_t bits = to_bits(z);
  bits = bits == 0x80000000u ? 0u : bits;
  const uint32_t ordered = bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u);
  return (bits & 0x7fffffffu) > 0x7f800000u ? 0u : ordered;
}

GQA_HOST_DEVICE float key_to_logit(uint32_t key) { return from_bits(key & 0x80000000u ? key ^ 0x80000000u : ~key); }

// One row's; 1, 0 and 0 change nothing.
struct Penalties {
  float repetition, frequency, presence;
};

// A count above 0 is how often the token was drawn; below 0, it occurs but was not drawn: in a prompt, say.
GQA_HOST_DEVICE float penalize(float z, int32_t count, const Penalties &p) {
  const float divided = div(z, p.repetition), multiplied = mul(z, p.repetition);
  const float repeated = z > 0.0f ? divided : multiplied;
  const float drawn = sub(sub(repeated, mul(p.frequency, static_cast<float>(count))), p.presence);
  return count == 0 ? z : (count < 0 ? repeated : drawn);
}

// A bias of 0 is none: it changes no more than the sign of a zero.
GQA_HOST_DEVICE float adjust(float z, int32_t count, const Penalties &p, float bias, bool allowed) {
  if (count != 0) z = penalize(z, count, p);
  return allowed ? add(z, bias) : kForbidden;
}

// log2(e) / temperature, the temperature kept where no intermediate overflows or is denormal.
GQA_HOST_DEVICE float scale_of(float temperature) {
  const float low = temperature < 0x1p-100f ? 0x1p-100f : temperature;
  return div(1.44269504f, low > 0x1p100f ? 0x1p100f : low);
}

// At most 0; inf - inf, which is a NaN, counts as 0.
GQA_HOST_DEVICE float exponent_of(float z, float max, float scale) {
  const float t = mul(sub(z, max), scale);
  return t < 0.0f ? t : 0.0f;
}

struct Weight {
  uint32_t bin;
  uint32_t m;
};

// For t from -43.75 up.
GQA_HOST_DEVICE Weight weigh_unchecked(float t) {
  const float rounded = add(t, 0x1.8p20f);  // one unit in the last place is 1/8
  const float f = sub(t, sub(rounded, 0x1.8p20f));
  float p = add(mul(f, 29102.869f), 125967.57f);
  p = add(mul(p, f), 363408.75f);
  p = add(mul(p, f), 0x1.1p23f);  // 2^23 + 2^19: the sum is rounded to an integer
  return {0x49c00000u - to_bits(rounded), to_bits(p) - 0x4b000000u};
}

GQA_HOST_DEVICE Weight weigh(float t) {
  const Weight weight = weigh_unchecked(t < -43.75f ? -43.75f : t);
  return {t < -43.75f ? kExcluded : weight.bin, weight.m};
}

// round(2^24 * 2^(-bin / 8)) for the bin's place in its octave.
GQA_HOST_DEVICE uint64_t bin_scale(uint32_t bin) {
  const bool odd = bin & 1;
  const uint32_t a = odd ? 15384775 : 16777216, b = odd ? 12937002 : 14107901;
  const uint32_t c = odd ? 10878679 : 11863283, d = odd ? 9147842 : 9975792;
  const uint32_t low = bin & 2 ? b : a, high = bin & 2 ? d : c;
  return bin & 4 ? high : low;
}

GQA_HOST_DEVICE uint64_t bin_mass(uint64_t sum, uint32_t bin) { return sum * bin_scale(bin) >> (bin >> 3); }

// The smallest sum with bin_mass(sum, bin) >= mass, where mass is at most the bin's.
GQA_HOST_DEVICE uint64_t sum_for_mass(uint64_t mass, uint32_t bin) {
  return ((mass << (bin >> 3)) + bin_scale(bin) - 1) / bin_scale(bin);
}

// ceil(mass * share / 2^32), at least 1. share <= 2^32.
GQA_HOST_DEVICE uint64_t share_of(uint64_t mass, uint64_t share) {
  const uint64_t part = (mass >> 32) * share + (((mass & 0xffffffffu) * share + 0xffffffffu) >> 32);
  return part == 0 ? 1 : part;
}

// top_p in units of 2^-32. Zero or less keeps the likeliest token and its ties alone, and so does NaN.
GQA_HOST_DEVICE uint64_t share_of_top_p(float top_p) {
  if (top_p >= 1.0f) return kTopPOff;
  return top_p > 0.0f ? static_cast<uint64_t>(static_cast<double>(top_p) * 0x1p32 + 0.5) : 0;
}

// log2(min_p) by integers, 28 bits after the point: the least exponent kept. -64 where min_p excludes nothing.
GQA_HOST_DEVICE float least_exponent(float min_p) {
  if (!(min_p > 0x1p-44f)) return -64.0f;
  if (min_p >= 1.0f) return 0.0f;
  const uint32_t bits = to_bits(min_p);
  uint64_t x = (uint64_t{bits & 0x7fffffu} | 0x800000u) << 40;  // in [1, 2), 63 bits after the point
  int64_t log = static_cast<int32_t>(bits >> 23) - 127;
  for (int i = 0; i < 28; ++i) {
    x = mul_high(x, x);  // in [1, 4), 62 bits after the point
    const bool carry = x >> 63;
    x = carry ? x : x << 1;
    log = log * 2 + carry;
  }
  return static_cast<float>(log) * 0x1p-28f;
}

struct Random {
  uint64_t bin, token;
};

// Philox4x32-10 (Salmon et al. 2011).
GQA_HOST_DEVICE Random philox(uint64_t seed, uint64_t offset, uint64_t row) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  uint32_t c0 = static_cast<uint32_t>(offset), c1 = static_cast<uint32_t>(offset >> 32);
  uint32_t c2 = static_cast<uint32_t>(row), c3 = static_cast<uint32_t>(row >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xd2511f53u} * c0, b = uint64_t{0xcd9e8d57u} * c2;
    c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(b);
    c3 = static_cast<uint32_t>(a);
    k0 += 0x9e3779b9u;
    k1 += 0xbb67ae85u;
  }
  return {uint64_t{c1} << 32 | c0, uint64_t{c3} << 32 | c2};
}

}  // namespace gqa::sampling
