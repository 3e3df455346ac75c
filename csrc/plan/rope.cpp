#include "plan/rope.h"

#include <algorithm>

#include "plan/rope_dense.h"

namespace gqa {
namespace {

gqa_status check_rotary(const gqa_rotary &r, int32_t dtype, int32_t head_dim) {
  if (r.dtype != dtype && r.dtype != GQA_DTYPE_FLOAT32) return GQA_STATUS_UNSUPPORTED;
  if (r.dim < 2 || r.dim % 2 != 0 || r.dim > head_dim || r.num_positions < 0) return GQA_STATUS_INVALID_ARGUMENT;
  const bool is_empty = !r.gathered && r.num_positions == 0;
  if (!is_empty && (r.cos == nullptr || r.sin == nullptr)) return GQA_STATUS_NULL_POINTER;
  if (r.positions.data == nullptr) return GQA_STATUS_OK;
  const bool is_index = r.positions.dtype == GQA_DTYPE_INT32 || r.positions.dtype == GQA_DTYPE_INT64;
  return is_index ? GQA_STATUS_OK : GQA_STATUS_UNSUPPORTED;
}

// Whether every run of a head that a thread touches is made of whole, aligned 16-byte vectors.
bool fits_vectors(const gqa_rope_params &p, int64_t vector) {
  const int64_t element = dtype_size(p.dtype), table_element = dtype_size(p.rotary.dtype);
  const int64_t table_stride[2] = {p.rotary.stride_batch, p.rotary.stride_row};
  return p.rotary.dim / 2 % vector == 0 && (p.head_dim - p.rotary.dim) % vector == 0 &&
         has_aligned_rows(p.q, p.q_stride, 3, element) && has_aligned_rows(p.k, p.k_stride, 3, element) &&
         has_aligned_rows(p.q_out, p.q_out_stride, 3, element) &&
         has_aligned_rows(p.k_out, p.k_out_stride, 3, element) &&
         has_aligned_rows(p.rotary.cos, table_stride, 2, table_element) &&
         has_aligned_rows(p.rotary.sin, table_stride, 2, table_element);
}

}  // namespace

gqa_status check_params(const gqa_rope_params *p) {
  GQA_RETURN_IF_ERROR(check_struct(p));
  if (!is_float_dtype(p->dtype)) return GQA_STATUS_UNSUPPORTED;
  if (p->batch < 0 || p->seqlen < 0 || p->num_q_heads < 0 || p->num_kv_heads < 0) return GQA_STATUS_INVALID_ARGUMENT;
  GQA_RETURN_IF_ERROR(check_rotary(p->rotary, p->dtype, p->head_dim));
  const bool has_work = p->batch * p->seqlen != 0;
  if (has_work && p->num_q_heads != 0 && (p->q == nullptr || p->q_out == nullptr)) return GQA_STATUS_NULL_POINTER;
  if (has_work && p->k != nullptr && p->k_out == nullptr) return GQA_STATUS_NULL_POINTER;
  return GQA_STATUS_OK;
}

}  // namespace gqa

extern "C" {

int64_t gqa_rope_rows(const gqa_rope_params *p) { return p->batch * p->seqlen; }

gqa_status gqa_rope_plan(const gqa_rope_params *p, const gqa_device *, gqa_plan *plan) {
  GQA_RETURN_IF_ERROR(gqa::check_params(p));
  *plan = {};
  const int64_t tokens = p->batch * p->seqlen;
  const int64_t heads = p->num_q_heads + (p->k != nullptr ? p->num_kv_heads : 0);
  if (tokens == 0 || heads == 0) return GQA_STATUS_OK;
  const int64_t vector = 16 / gqa::dtype_size(p->dtype);
  const bool vectors = gqa::fits_vectors(*p, vector);
  if (tokens > INT32_MAX) return GQA_STATUS_UNSUPPORTED;
  const int64_t bytes = 2 * tokens * heads * p->head_dim * gqa::dtype_size(p->dtype);
  gqa::RopeVariant variant{vectors, tokens <= gqa::kFewTokens, bytes >= gqa::kPastCache, false, false};
  variant.dense = gqa::is_dense_rope(*p, vectors) && p->head_dim / 2 / vector <= 32;
  if (variant.dense) {
    gqa::plan_rope_dense("rope", "rope_dense", p->dtype, tokens, heads, p->head_dim / 2 / vector, variant, plan);
    return GQA_STATUS_OK;
  }
  // x walks a head in steps of the vector, y takes a head each, z fills small blocks with more tokens.
  constexpr int64_t kMaxThreads = 320, kFullBlock = 256;
  const int64_t x = std::min<int64_t>(p->rotary.dim / 2 / (vectors ? vector : 1), 64);
  const int64_t y = std::min<int64_t>(heads, kMaxThreads / x);
  const int64_t z = std::min<int64_t>(std::max<int64_t>(kFullBlock / (x * y), 1), std::min<int64_t>(tokens, 64));
  const int64_t grid = gqa::ceil_div(tokens, z);
  gqa::add_launch(plan, gqa::make_launch("rope", vectors ? "rope_vector" : "rope_scalar", p->dtype, {grid}, {x, y, z},
                                         0, variant.encode()));
  plan->reason = vectors ? "heads and tables are 16-byte aligned"
                         : "heads or tables are not made of whole, aligned 16-byte vectors";
  return GQA_STATUS_OK;
}

}  // extern "C"
