// Which row of the histogram a token's weight goes to: its bin's, or, where the logits span few bins, one of the
// 2^shift rows among which a bin is divided. So the row in which a filter ends holds few tokens however flat the logits
// are.
#pragma once

#include "common/sampling.h"

namespace gqa::cuda {

// A float from which on the last place is 1, and its bits: adding it rounds to an integer.
constexpr float kUnit = 0x1p23f;
constexpr uint32_t kUnits = 0x4b000000u;
constexpr uint32_t kZero = 0x49c00000u;  // of what weigh_unchecked() rounds to eighths by, from which a bin counts down

// Within its bin a token's row is first - f * steps, rounded, of the remainder f, from 1/16 down to -1/16: less than
// half a row is left at both ends, so it stays among the bin's. Monotone, as rounding is.
struct Scale {
  uint32_t shift;
  float steps, first;
  float least;                 // the row's least exponent
  float max, factor, inverse;  // of exponent_of(), and 1 / factor: the controller's

  // For exponents from `least` up: as many as fit 351 rows, whole bins.
  __device__ __forceinline__ static Scale down_to(float least) {
    Scale by{0, 0.0f, kUnit, least, 0.0f, 0.0f, 0.0f};
    if (least < -10.75f) return by;
    by.shift = 2u + (least >= -5.25f) + (least >= -2.5f) + (least >= -1.125f);
    const float rows = static_cast<float>(1u << by.shift);
    by.steps = 8.0f * rows - 8.25f;
    by.first = kUnit + 0.5f * rows;
    return by;
  }

  __device__ __forceinline__ bool is_fine() const { return shift != 0; }

  // kUnits and the row within the bin.
  __device__ __forceinline__ uint32_t units_within(float t) const {
    const float f = sampling::sub(t, sampling::sub(sampling::add(t, 0x1.8p20f), 0x1.8p20f));
    return sampling::to_bits(__fmaf_rn(f, -steps, first));
  }

  // The exponent so many rows below the middle of a row, but for rounding.
  __device__ __forceinline__ float edge_of(uint32_t row, float below) const {
    const float within = static_cast<float>(row & ((1u << shift) - 1)) + below;
    return -0.125f * static_cast<float>(row >> shift) - __fdividef(within - (first - kUnit), steps);
  }

  // For t from -43.75 up.
  __device__ __forceinline__ uint32_t row_of(float t) const {
    return (sampling::weigh_unchecked(t).bin << shift) + units_within(t) - kUnits;
  }
};

}  // namespace gqa::cuda
