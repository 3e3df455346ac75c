#include "plan/rmsnorm.h"

#include <algorithm>
#include <type_traits>

#include "plan/pointwise.h"

namespace gqa {
namespace {

// Two rows an SM: from there on bytes in flight count for more than latency.
constexpr int64_t kFewRowsLimit = 264;
// Eight rows an SM: up to there rows of one vector a thread, four blocks to an SM, even out better over the SMs.
constexpr int64_t kMediumRowsLimit = 1056;
// Up to this many vectors a dense row is one warp's.
constexpr int64_t kWarpVectors = 128;
// Threads that narrow rows share a block up to.
constexpr int64_t kThreads = 256;
// Up to this many vectors a row takes one or two a thread.
constexpr int64_t kLightVectors = 512;
// Vectors of a tree of square_sum.cuh, which is what a block of a cluster takes, or two of them, of a dense row.
constexpr int64_t kTreeVectors = 512;
constexpr int64_t kMostBlocks = 8;  // of a cluster, on any GPU that has clusters
// Shared memory that every GPU from sm_80 on has for a block.
constexpr int64_t kMaxKept = 96 * 1024;

template <typename Params>
gqa_status check(const Params *p) {
  GQA_RETURN_IF_ERROR(check_struct(p));
  if (!is_float_dtype(p->dtype)) return GQA_STATUS_UNSUPPORTED;
  if (p->weight_dtype != p->dtype && p->weight_dtype != GQA_DTYPE_FLOAT32) return GQA_STATUS_UNSUPPORTED;
  if (p->rows[0] < 0 || p->rows[1] < 0 || p->hidden < 1) return GQA_STATUS_INVALID_ARGUMENT;
  if (p->rows[0] * p->rows[1] == 0) return GQA_STATUS_OK;
  const bool complete = p->x != nullptr && p->weight != nullptr && p->out != nullptr;
  return complete ? GQA_STATUS_OK : GQA_STATUS_NULL_POINTER;
}

// The widest power of two, in elements and up to `vector`, that base and strides are multiples of.
int64_t chunk_of(const void *base, const int64_t *stride, int64_t vector, int64_t element) {
  int64_t chunk = vector;
  while (chunk > 1 && (reinterpret_cast<uintptr_t>(base) % (chunk * element) != 0 || stride[0] % chunk != 0 ||
                       stride[1] % chunk != 0)) {
    chunk /= 2;
  }
  return chunk;
}

// Elements that every row, its end included, can be moved by: `vector`, half of it, or 1.
template <typename Params>
int64_t row_chunk(const Params *p, int64_t vector) {
  const int64_t element = dtype_size(p->dtype), end[2] = {p->hidden, 0}, contiguous[2] = {};
  int64_t chunk = std::min({chunk_of(p->x, p->x_stride, vector, element),
                            chunk_of(p->out, p->out_stride, vector, element), chunk_of(nullptr, end, vector, element)});
  chunk = std::min(chunk, chunk_of(p->weight, contiguous, vector, element));
  if constexpr (std::is_same_v<Params, gqa_add_rmsnorm_params>) {
    chunk = std::min({chunk, chunk_of(p->residual, p->residual_stride, vector, element),
                      chunk_of(p->residual_out, p->residual_out_stride, vector, element)});
  }
  return chunk == vector || 2 * chunk == vector ? chunk : 1;
}

template <typename Params>
bool is_dense_norm(const Params &p) {
  bool dense = p.weight_dtype == p.dtype && is_dense(p, {p.x, p.x_stride}) && is_dense(p, {p.out, p.out_stride});
  if constexpr (std::is_same_v<Params, gqa_add_rmsnorm_params>) {
    dense =
        dense && is_dense(p, {p.residual, p.residual_stride}) && is_dense(p, {p.residual_out, p.residual_out_stride});
  }
  return dense;
}

// Whether rows begin alike, at a vector or between two, in all tensors.
template <typename Params>
bool begin_alike(const Params &p) {
  const auto like_x = [&](const void *data) {
    return (reinterpret_cast<uintptr_t>(data) - reinterpret_cast<uintptr_t>(p.x)) % 16 == 0;
  };
  if constexpr (std::is_same_v<Params, gqa_add_rmsnorm_params>) {
    return like_x(p.out) && like_x(p.residual) && like_x(p.residual_out);
  }
  return like_x(p.out);
}

bool has_clusters(const gqa_device *device) {
  return device != nullptr && device->compute_capability == 90 && has_sm90_code();
}

// The kernels of dense_rows.cuh; false where they do not serve. `variant` holds what is known of it.
template <typename Params>
bool plan_dense(const char *op, const Params &p, const gqa_device *device, NormVariant variant, gqa_plan *plan) {
  const int64_t rows = p.rows[0] * p.rows[1], vector = 16 / dtype_size(p.dtype);
  const bool whole = variant.chunk == vector;
  const int64_t vectors = p.hidden / vector;  // half of one may be left
  const bool narrow = p.hidden <= 32 * vector;
  if (!is_dense_norm(p) || variant.chunk == 1) return false;
  if (!whole && (narrow || vectors >= 2 * kTreeVectors || !begin_alike(p))) return false;
  variant.dense = true;
  const bool adds = light_held<Params>() == 1;
  if (vectors <= kWarpVectors && whole) {
    int64_t x = 32;
    while (x > 1 && x / 2 >= vectors) x /= 2;
    const int64_t y = std::max<int64_t>(32 / x, variant.few_rows ? 1 : kThreads / x), rows_each = vectors <= 64 ? 2 : 1;
    const char *kernel = narrow          ? "norm_dense_narrow_rows"
                         : vectors <= 64 ? "norm_dense_warp_pairs"
                                         : "norm_dense_warp_rows";
    variant.held = 0;
    add_launch(plan, make_launch(op, kernel, p.dtype, {ceil_div(rows, rows_each * y)}, {x, y}, 0, variant.encode()));
    plan->reason = "a row without gaps fits the registers of one warp";
    return true;
  }
  const bool light = adds || rows <= kMediumRowsLimit;
  variant.usual = variant.past_cache && !variant.few_rows && p.weight_offset == 0 &&
                  (p.cast_before_weight != 0 || p.dtype == GQA_DTYPE_FLOAT32);
  variant.held = !whole || vectors > kTreeVectors ? (light ? 2 : 4) : light ? 1 : 2;
  if (!whole && variant.usual) variant.held = 4;
  int64_t threads = ceil_div(ceil_div<int64_t>(vectors, variant.held), int64_t{32}) * 32;
  if (vectors > 2 * kTreeVectors) {
    const int64_t trees = ceil_div(vectors, kTreeVectors);
    // A pair of blocks finds room on every SM, larger clusters do not.
    const int64_t trees_a_block = trees == 4 && !adds && rows > kMediumRowsLimit ? 2 : ceil_div(trees, kMostBlocks);
    if (!has_clusters(device) || trees_a_block > 2) return false;
    variant.held = !adds ? 4 : static_cast<int>(trees_a_block);
    variant.cluster = static_cast<int>(ceil_div(trees, trees_a_block));
    threads = trees_a_block * kTreeVectors / variant.held;
    variant.late = !adds && !variant.usual && (trees_a_block == 2 || variant.few_rows);
    // Half of the rows that registers let clusters hold at once.
    const int64_t held_threads = adds && trees_a_block == 1 ? 1536 : 1024;
    const int64_t ahead = device->num_sms * (held_threads / threads) / variant.cluster / 2;
    if (variant.usual) variant.ahead = static_cast<int>(std::clamp<int64_t>(ahead, 1, 255));
  }
  const int64_t blocks = rows * std::max(variant.cluster, 1);
  if (blocks > INT32_MAX) return false;
  const char *kernel = whole ? "norm_dense_rows" : "norm_dense_half_rows";
  add_launch(plan, make_launch(op, kernel, p.dtype, {blocks}, {threads}, 0, variant.encode()));
  plan->reason = variant.cluster > 1 ? "a row without gaps is spread over the blocks of a cluster"
                                     : "a row without gaps is spread over the threads of a block";
  return true;
}

template <typename Params>
gqa_status plan_rows(const char *op, const Params *p, const gqa_device *device, gqa_plan *plan) {
  GQA_RETURN_IF_ERROR(check_params(p));
  *plan = {};
  const int64_t rows = p->rows[0] * p->rows[1];
  if (rows > INT32_MAX) return GQA_STATUS_UNSUPPORTED;
  if (rows == 0) return GQA_STATUS_OK;
  const int64_t element = dtype_size(p->dtype), vector = 16 / element, vectors = ceil_div(p->hidden, vector);
  const int64_t tensors = std::is_same_v<Params, gqa_add_rmsnorm_params> ? 4 : 2;
  const bool narrow = vectors <= 32;
  NormVariant variant{};
  variant.chunk = static_cast<int>(row_chunk(p, vector));
  variant.held = narrow ? 0 : vectors <= kLightVectors ? light_held<Params>() : kMostHeld;
  const int64_t most = most_threads(variant.held, variant.chunk == vector && light_held<Params>() == 2);
  variant.few_rows = rows <= kFewRowsLimit;
  variant.past_cache = rows * p->hidden * element * tensors >= kPastCache;
  if (plan_dense(op, *p, device, variant, plan)) return GQA_STATUS_OK;
  // x threads take a row: a power of two where they are less than a warp. Many narrow rows share a block.
  int64_t x = 32;
  while (x > 1 && x / 2 >= vectors) x /= 2;
  if (!narrow) x = std::min(most, ceil_div(ceil_div<int64_t>(vectors, variant.held), int64_t{32}) * 32);
  const int64_t y = std::max<int64_t>({1, 32 / x, variant.few_rows ? 1 : kThreads / x});
  int64_t shared_memory = narrow ? 0 : y * ceil_div(vectors, int64_t{512}) * 64;
  const int64_t rest = std::max<int64_t>(0, ceil_div(vectors, x) - kMostHeld) * x * 16;
  variant.keeps = rest > 0 && shared_memory + rest <= kMaxKept;
  if (variant.keeps) shared_memory += rest;
  if (shared_memory > kMaxKept) return GQA_STATUS_UNSUPPORTED;
  add_launch(plan, make_launch(op, narrow ? "norm_narrow_rows" : "norm_rows", p->dtype, {ceil_div(rows, y)}, {x, y},
                               shared_memory, variant.encode()));
  plan->reason = narrow ? "a row fits the registers of one warp" : "a row is spread over the threads of a block";
  return GQA_STATUS_OK;
}

}  // namespace

gqa_status check_params(const gqa_rmsnorm_params *p) { return check(p); }

gqa_status check_params(const gqa_add_rmsnorm_params *p) {
  GQA_RETURN_IF_ERROR(check(p));
  if (p->rows[0] * p->rows[1] == 0) return GQA_STATUS_OK;
  return p->residual != nullptr && p->residual_out != nullptr ? GQA_STATUS_OK : GQA_STATUS_NULL_POINTER;
}

}  // namespace gqa

extern "C" {

int64_t gqa_rmsnorm_rows(const gqa_rmsnorm_params *p) { return p->rows[0] * p->rows[1]; }
int64_t gqa_add_rmsnorm_rows(const gqa_add_rmsnorm_params *p) { return p->rows[0] * p->rows[1]; }

gqa_status gqa_rmsnorm_plan(const gqa_rmsnorm_params *p, const gqa_device *device, gqa_plan *plan) {
  return gqa::plan_rows("rmsnorm", p, device, plan);
}

gqa_status gqa_add_rmsnorm_plan(const gqa_add_rmsnorm_params *p, const gqa_device *device, gqa_plan *plan) {
  return gqa::plan_rows("add_rmsnorm", p, device, plan);
}

}  // extern "C"
