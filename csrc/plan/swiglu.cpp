#include "plan/swiglu.h"

namespace gqa {
namespace {

// Bytes: a power of two up to 16 that divides where each row begins.
int64_t widest_access(const gqa_swiglu_params &flat) {
  const int64_t element = dtype_size(flat.dtype);
  const Operands all = operands(flat);
  int64_t misplaced = 16;
  for (const Operand &operand : {all.first, all.second, all.out}) {
    misplaced |= static_cast<int64_t>(reinterpret_cast<uintptr_t>(operand.data));
    for (int i = 0; i < 2; ++i) misplaced |= flat.rows[i] == 1 ? 0 : operand.stride[i] * element;
  }
  return misplaced & -misplaced;
}

// x walks a row, y takes several rows where they are short. A warp that takes several accesses takes them of one row.
gqa_status plan_rows(const gqa_swiglu_params &flat, gqa_plan *plan) {
  const int64_t rows = flat.rows[0] * flat.rows[1], access = widest_access(flat), element = dtype_size(flat.dtype);
  if (access < element) return GQA_STATUS_INVALID_ARGUMENT;  // elements that are not aligned
  const int64_t accesses = ceil_div(flat.hidden * element, access), runs = swiglu_runs(access);
  // Little work is spread over more blocks, for latency.
  constexpr int64_t kLittle = int64_t{1} << 20;
  const int64_t threads = rows * flat.hidden * element < kLittle ? 128 : 256;
  int64_t x = threads;
  while (x > (runs == 1 ? 1 : 32) && x / 2 * runs >= accesses) x /= 2;
  constexpr int64_t kMost = 65535;  // of a grid's y and z
  const int64_t y = threads / x, spans = ceil_div(accesses, x * runs), groups = ceil_div(rows, y);
  const Dim3 grid{spans, std::min(groups, kMost), ceil_div(groups, kMost)};
  if (spans > INT32_MAX || grid.z > kMost) return GQA_STATUS_UNSUPPORTED;
  const int32_t variant = static_cast<int32_t>(access);
  add_launch(plan, make_launch("swiglu", "swiglu_rows", flat.dtype, grid, {x, y}, 0, variant));
  plan->reason = access == 16  ? "rows allow accesses of 16 bytes"
                 : access == 8 ? "rows allow accesses of 8 bytes"
                 : access == 4 ? "rows allow accesses of 4 bytes"
                               : "rows allow accesses of 2 bytes";
  return GQA_STATUS_OK;
}

}  // namespace
}  // namespace gqa

extern "C" {

int64_t gqa_swiglu_rows(const gqa_swiglu_params *p) { return gqa::cpu_spans(*p); }

gqa_status gqa_swiglu_plan(const gqa_swiglu_params *p, const gqa_device *, gqa_plan *plan) {
  GQA_RETURN_IF_ERROR(gqa::check_pointwise(p));
  *plan = {};
  const gqa_swiglu_params flat = gqa::flattened(*p);
  return flat.rows[0] * flat.rows[1] * flat.hidden == 0 ? GQA_STATUS_OK : gqa::plan_rows(flat, plan);
}

}  // extern "C"
