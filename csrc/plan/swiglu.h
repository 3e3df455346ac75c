// swiglu's layout: the widest access that all rows allow, and how blocks divide a row.
#pragma once

#include "plan/pointwise.h"

namespace gqa {

// Accesses of so many bytes that a thread makes, all in flight at once: where it must find its row first, more of them.
constexpr int swiglu_runs(int64_t access, bool dense) {
  return static_cast<int>((dense || access == 2 ? 16 : 32) / access);
}

inline bool is_one_row(const gqa_swiglu_params &flat) { return flat.rows[0] * flat.rows[1] == 1; }

}  // namespace gqa
