// Walks the spans of an elementwise op, as plan/pointwise.h divides them.
#pragma once

#include "cpu/types.h"
#include "plan/pointwise.h"

namespace gqa::cpu {

template <typename T, typename Params>
GQA_INLINE T *at(const Params &p, const Operand &operand, int64_t row, int64_t column) {
  return static_cast<T *>(const_cast<void *>(operand.data)) + row / p.rows[1] * operand.stride[0] +
         row % p.rows[1] * operand.stride[1] + column;
}

// Op::run(a, b, out, count) for every stretch of spans [first, last).
template <typename Op, typename T, typename Params>
GQA_INLINE void pointwise_spans(const Params &flat, int64_t first, int64_t last) {
  const Operands all = operands(flat);
  const int64_t spans = ceil_div(flat.hidden, kCpuSpan);
  for (int64_t span = first; span < last; ++span) {
    const int64_t row = span / spans, column = span % spans * kCpuSpan;
    const int64_t count = flat.hidden - column < kCpuSpan ? flat.hidden - column : kCpuSpan;
    const T *a = at<T>(flat, all.first, row, column), *b = at<T>(flat, all.second, row, column);
    Op::template run<T>(a, b, at<T>(flat, all.out, row, column), count);
  }
}

}  // namespace gqa::cpu
