#include "plan/kv_cache_append.h"

#include <initializer_list>

#include "plan/plan.h"
#include "plan/tensors.h"

namespace gqa {
namespace {

constexpr int64_t kThreads = 256;
constexpr int64_t kChunk = 8;  // elements a thread moves

gqa_status check_rotary(const gqa_rotary &r, int32_t dtype, int32_t head_dim) {
  if ((r.cos == nullptr) != (r.sin == nullptr)) return GQA_STATUS_NULL_POINTER;
  if (r.cos == nullptr) return GQA_STATUS_OK;
  if (r.dtype != dtype && r.dtype != GQA_DTYPE_FLOAT32) return GQA_STATUS_UNSUPPORTED;
  const bool sizes = r.dim >= 0 && r.dim % 2 == 0 && r.dim <= head_dim && r.num_positions >= 0;
  return sizes ? GQA_STATUS_OK : GQA_STATUS_INVALID_ARGUMENT;
}

// No token, or no row in the cache that could take one.
bool is_empty(const gqa_kv_cache_append_params *p) {
  const bool no_tokens = p->batch * p->seqlen == 0 || (p->cu_seqlens.data != nullptr && p->total_tokens == 0);
  return no_tokens || p->cache_capacity == 0 || (p->block_table.data != nullptr && p->num_pages == 0);
}

}  // namespace

gqa_status check_params(const gqa_kv_cache_append_params *p) {
  GQA_RETURN_IF_ERROR(check_struct(p));
  if (!is_float_dtype(p->dtype)) return GQA_STATUS_UNSUPPORTED;
  const bool sizes = p->batch >= 0 && p->seqlen >= 0 && p->total_tokens >= 0 && p->num_kv_heads >= 1 &&
                     p->head_dim >= 1 && p->cache_capacity >= 0 && p->num_pages >= 0;
  if (!sizes || (p->block_table.data != nullptr && p->page_size < 1)) return GQA_STATUS_INVALID_ARGUMENT;
  if (p->head_dim % kChunk != 0) return GQA_STATUS_UNSUPPORTED;
  for (const gqa_index *index :
       {&p->cache_seqlens, &p->cu_seqlens, &p->cache_leftpad, &p->block_table, &p->rotary.positions}) {
    if (!is_index(*index)) return GQA_STATUS_UNSUPPORTED;
  }
  GQA_RETURN_IF_ERROR(check_rotary(p->rotary, p->dtype, p->head_dim));
  GQA_RETURN_IF_ERROR(check_quantization(p->quantization, p->dtype, p->head_dim));
  if (is_empty(p)) return GQA_STATUS_OK;
  const bool complete = p->k != nullptr && p->v != nullptr && p->k_cache != nullptr && p->v_cache != nullptr;
  return complete && p->cache_seqlens.data != nullptr ? GQA_STATUS_OK : GQA_STATUS_NULL_POINTER;
}

}  // namespace gqa

extern "C" {

int64_t gqa_kv_cache_append_rows(const gqa_kv_cache_append_params *p) {
  return gqa::is_empty(p) ? 0 : p->batch * p->seqlen;
}

gqa_status gqa_kv_cache_append_plan(const gqa_kv_cache_append_params *p, const gqa_device *, gqa_plan *plan) {
  GQA_RETURN_IF_ERROR(gqa::check_params(p));
  *plan = {};
  if (gqa::is_empty(p)) return GQA_STATUS_OK;
  const int64_t chunks = p->batch * p->seqlen * p->num_kv_heads * (p->head_dim / gqa::kChunk);
  const int64_t blocks = gqa::ceil_div(chunks, gqa::kThreads);
  if (blocks > INT32_MAX) return GQA_STATUS_UNSUPPORTED;
  gqa_launch launch = gqa::make_launch("kv_cache_append", "append_chunks", p->dtype, {blocks}, {gqa::kThreads});
  gqa::name_quantized(p->quantization.dtype, &launch);
  gqa::add_launch(plan, launch);
  plan->reason = "one thread per 8 elements of a new row serves every layout";
  return GQA_STATUS_OK;
}

}  // extern "C"
