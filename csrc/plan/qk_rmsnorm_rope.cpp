#include "plan/qk_rmsnorm_rope.h"

#include <algorithm>

#include "plan/rope_dense.h"

namespace gqa {
namespace {

// Whether a head fits a warp as whole, aligned 16-byte vectors, no vector of it both rotated and not.
bool fits_vectors(const gqa_qk_rmsnorm_rope_params &p, int64_t vector) {
  const int64_t element = dtype_size(p.dtype), table_element = dtype_size(p.rotary.dtype);
  const int64_t table_stride[2] = {p.rotary.stride_batch, p.rotary.stride_row};
  return p.head_dim <= 32 * vector && p.head_dim % vector == 0 && p.rotary.dim % vector == 0 &&
         (p.rotary.interleaved || p.rotary.dim / 2 % vector == 0) && has_aligned_rows(p.q, p.q_stride, 3, element) &&
         has_aligned_rows(p.k, p.k_stride, 3, element) && has_aligned_rows(p.q_out, p.q_out_stride, 3, element) &&
         has_aligned_rows(p.k_out, p.k_out_stride, 3, element) && has_aligned_rows(p.q_weight, nullptr, 0, 2) &&
         has_aligned_rows(p.k_weight, nullptr, 0, 2) &&
         has_aligned_rows(p.rotary.cos, table_stride, 2, table_element) &&
         has_aligned_rows(p.rotary.sin, table_stride, 2, table_element);
}

}  // namespace

gqa_rope_params rope_of(const gqa_qk_rmsnorm_rope_params &p) {
  gqa_rope_params rope{};
  rope.struct_size = sizeof(rope);
  rope.dtype = p.dtype;
  rope.q = rope.q_out = p.q_out;
  rope.k = rope.k_out = p.k_out;
  rope.batch = p.batch;
  rope.seqlen = p.seqlen;
  rope.num_q_heads = p.num_q_heads;
  rope.num_kv_heads = p.num_kv_heads;
  rope.head_dim = p.head_dim;
  std::copy_n(p.q_out_stride, 3, rope.q_stride);
  std::copy_n(p.q_out_stride, 3, rope.q_out_stride);
  std::copy_n(p.k_out_stride, 3, rope.k_stride);
  std::copy_n(p.k_out_stride, 3, rope.k_out_stride);
  rope.rotary = p.rotary;
  return rope;
}

gqa_status check_params(const gqa_qk_rmsnorm_rope_params *p) {
  GQA_RETURN_IF_ERROR(check_struct(p));
  const gqa_rope_params rope = rope_of(*p);
  GQA_RETURN_IF_ERROR(check_params(&rope));
  if (p->weight_dtype != p->dtype && p->weight_dtype != GQA_DTYPE_FLOAT32) return GQA_STATUS_UNSUPPORTED;
  if (p->head_dim < 1) return GQA_STATUS_INVALID_ARGUMENT;
  if (p->batch * p->seqlen == 0) return GQA_STATUS_OK;
  const bool has_q = p->num_q_heads == 0 || (p->q != nullptr && p->q_weight != nullptr);
  const bool has_k = p->num_kv_heads == 0 || (p->k != nullptr && p->k_out != nullptr && p->k_weight != nullptr);
  return has_q && has_k ? GQA_STATUS_OK : GQA_STATUS_NULL_POINTER;
}

}  // namespace gqa

extern "C" {

int64_t gqa_qk_rmsnorm_rope_rows(const gqa_qk_rmsnorm_rope_params *p) { return p->batch * p->seqlen; }

gqa_status gqa_qk_rmsnorm_rope_plan(const gqa_qk_rmsnorm_rope_params *p, const gqa_device *, gqa_plan *plan) {
  GQA_RETURN_IF_ERROR(gqa::check_params(p));
  *plan = {};
  const int64_t tokens = p->batch * p->seqlen, heads = p->num_q_heads + p->num_kv_heads;
  if (tokens == 0 || heads == 0) return GQA_STATUS_OK;
  if (tokens > INT32_MAX) return GQA_STATUS_UNSUPPORTED;
  const int64_t element = gqa::dtype_size(p->dtype), vector = 16 / element;
  gqa::RopeVariant variant{gqa::fits_vectors(*p, vector), tokens <= gqa::kFewTokens,
                           2 * tokens * heads * p->head_dim * element >= gqa::kPastCache, false, false};
  // The lanes of a head, each with the two halves of its pairs, meet by a butterfly: a power of two of them.
  int64_t lanes = 1;
  while (lanes * 2 * vector < p->head_dim) lanes *= 2;
  variant.dense = gqa::is_dense_rope(*p, variant.vectors) && !p->rotary.interleaved;
  variant.usual = variant.dense && gqa::rows_by_token(*p) >= tokens && p->weight_offset == 0 &&
                  (p->cast_before_weight != 0 || p->dtype == GQA_DTYPE_FLOAT32);
  if (variant.dense) {
    gqa::plan_rope_dense("qk_rmsnorm_rope", "qk_rmsnorm_rope_dense", p->dtype, tokens, heads, lanes, variant, plan);
    return GQA_STATUS_OK;
  }
  // x is the lanes of a head: a power of two where heads share a warp.
  constexpr int64_t kThreads = 320, kFullBlock = 256, kWarps = 4;
  int64_t x = 32;
  if (!variant.vectors) {
    const int64_t sums = gqa::ceil_div<int64_t>(p->head_dim, 512 * vector) * 64;
    const int64_t shared_memory = kWarps * (sums + gqa::ceil_div<int64_t>(p->head_dim * element, 16) * 16);
    if (shared_memory > 48 * 1024) return GQA_STATUS_UNSUPPORTED;
    const int64_t grid = gqa::ceil_div(tokens * heads, kWarps);
    if (grid > INT32_MAX) return GQA_STATUS_UNSUPPORTED;
    gqa::add_launch(plan, gqa::make_launch("qk_rmsnorm_rope", "qk_rmsnorm_rope_scalar", p->dtype, {grid}, {x, kWarps},
                                           shared_memory, variant.encode()));
    plan->reason = "heads, weights or tables are not made of whole, aligned 16-byte vectors, 32 to a head at most";
    return GQA_STATUS_OK;
  }
  while (x / 2 * vector >= p->head_dim) x /= 2;
  // Whole warps, as lanes trade their vectors.
  const int64_t in_warp = 32 / x;
  const int64_t y = std::min(gqa::ceil_div(heads, in_warp) * in_warp, kThreads / x);
  const int64_t z = std::min<int64_t>(std::max<int64_t>(kFullBlock / (x * y), 1), std::min<int64_t>(tokens, 64));
  gqa::add_launch(plan, gqa::make_launch("qk_rmsnorm_rope", "qk_rmsnorm_rope_vector", p->dtype,
                                         {gqa::ceil_div(tokens, z)}, {x, y, z}, 0, variant.encode()));
  plan->reason = "heads, weights and tables are 16-byte aligned";
  return GQA_STATUS_OK;
}

}  // extern "C"
