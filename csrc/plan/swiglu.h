// swiglu's layout: the widest access that all rows allow, and how blocks divide a row.
#pragma once

#include "plan/pointwise.h"

namespace gqa {

// Accesses of so many bytes that a thread makes, all in flight at once.
constexpr int swiglu_runs(int64_t access) { return static_cast<int>(16 / access); }

inline bool is_one_row(const gqa_swiglu_params &flat) { return flat.rows[0] * flat.rows[1] == 1; }

}  // namespace gqa
