#include "plan/gqa_attention.h"

#include <algorithm>
#include <cmath>

#include "plan/plan.h"

namespace gqa {
namespace {

constexpr int32_t kMaxHeadDim = 256;
constexpr int64_t kMaxDecodeQueries = 16;

bool is_index(const gqa_index &index) {
  return index.data == nullptr || index.dtype == GQA_DTYPE_INT32 || index.dtype == GQA_DTYPE_INT64;
}

bool is_ragged(const gqa_attention_params *p) { return p->cu_seqlens_q.data != nullptr; }

int64_t query_tokens(const gqa_attention_params *p) { return is_ragged(p) ? p->total_q : p->batch * p->seqlen_q; }

int64_t key_tokens(const gqa_attention_params *p) {
  if (p->k_cache != nullptr && is_ragged(p)) return p->total_q;
  return p->cu_seqlens_k.data != nullptr ? p->total_k : p->batch * p->seqlen_k;
}

gqa_status check_sizes(const gqa_attention_params *p) {
  if (p->batch < 0 || p->seqlen_q < 0 || p->seqlen_k < 0 || p->total_q < 0 || p->total_k < 0) {
    return GQA_STATUS_INVALID_ARGUMENT;
  }
  if (p->num_kv_heads < 1 || p->num_q_heads < 1 || p->num_q_heads % p->num_kv_heads != 0 || p->head_dim < 1) {
    return GQA_STATUS_INVALID_ARGUMENT;
  }
  if (p->window_left < -1 || p->window_right < -1 || !(p->softcap >= 0) || p->num_splits < 0 || p->workspace_size < 0) {
    return GQA_STATUS_INVALID_ARGUMENT;
  }
  return p->head_dim <= kMaxHeadDim && p->head_dim % 8 == 0 ? GQA_STATUS_OK : GQA_STATUS_UNSUPPORTED;
}

gqa_status check_rotary(const gqa_attention_params *p) {
  const gqa_rotary &r = p->rotary;
  if ((r.cos == nullptr) != (r.sin == nullptr)) return GQA_STATUS_NULL_POINTER;
  if (r.cos == nullptr) return GQA_STATUS_OK;
  if (r.dtype != p->dtype && r.dtype != GQA_DTYPE_FLOAT32) return GQA_STATUS_UNSUPPORTED;
  if (r.dim < 0 || r.dim % 2 != 0 || r.dim > p->head_dim || r.num_positions < 0) return GQA_STATUS_INVALID_ARGUMENT;
  // Tables or positions per token serve q and k alike, so both have the same tokens.
  const bool per_token = r.gathered != 0 || r.positions.data != nullptr;
  const bool same = p->k == nullptr || key_tokens(p) == query_tokens(p);
  return !per_token || same ? GQA_STATUS_OK : GQA_STATUS_INVALID_ARGUMENT;
}

gqa_status check_cache(const gqa_attention_params *p) {
  if ((p->k_cache == nullptr) != (p->v_cache == nullptr)) return GQA_STATUS_NULL_POINTER;
  if (p->k_cache == nullptr) {
    return p->block_table.data == nullptr ? GQA_STATUS_OK : GQA_STATUS_INVALID_ARGUMENT;
  }
  if (p->cache_seqlens.data == nullptr) return GQA_STATUS_NULL_POINTER;
  if (p->cu_seqlens_k.data != nullptr && !is_ragged(p)) return GQA_STATUS_INVALID_ARGUMENT;
  if (p->cache_capacity < 0 || p->num_pages < 0) return GQA_STATUS_INVALID_ARGUMENT;
  return p->block_table.data == nullptr || p->page_size >= 1 ? GQA_STATUS_OK : GQA_STATUS_INVALID_ARGUMENT;
}

gqa_status check_params(const gqa_attention_params *p) {
  GQA_RETURN_IF_ERROR(check_struct(p));
  if (!is_float_dtype(p->dtype)) return GQA_STATUS_UNSUPPORTED;
  GQA_RETURN_IF_ERROR(check_sizes(p));
  if (p->sinks != nullptr && p->sinks_dtype != p->dtype && p->sinks_dtype != GQA_DTYPE_FLOAT32) {
    return GQA_STATUS_UNSUPPORTED;
  }
  for (const gqa_index *index : {&p->cache_seqlens, &p->cu_seqlens_q, &p->cu_seqlens_k, &p->cache_leftpad,
                                 &p->block_table, &p->rotary.positions}) {
    if (!is_index(*index)) return GQA_STATUS_UNSUPPORTED;
  }
  if (is_empty(p)) return GQA_STATUS_OK;
  if (query_tokens(p) > 0 && (p->q == nullptr || p->out == nullptr)) return GQA_STATUS_NULL_POINTER;
  if ((p->k == nullptr) != (p->v == nullptr)) return GQA_STATUS_NULL_POINTER;
  if (p->k == nullptr && p->k_cache == nullptr && key_tokens(p) > 0) return GQA_STATUS_NULL_POINTER;
  GQA_RETURN_IF_ERROR(check_cache(p));
  return check_rotary(p);
}

}  // namespace

bool is_empty(const gqa_attention_params *p) {
  const bool appends = p->k != nullptr && p->k_cache != nullptr;
  return query_tokens(p) == 0 && !(appends && key_tokens(p) > 0);
}

int64_t cpu_query_blocks(const gqa_attention_params *p) {
  const int64_t longest = is_ragged(p) ? std::min(p->seqlen_q, p->total_q) : p->seqlen_q;
  return std::max<int64_t>(1, ceil_div(longest, kCpuQueryBlock));
}

gqa_status check_attention_prefill(const gqa_attention_params *p) { return check_params(p); }

gqa_status check_attention_decode(const gqa_attention_params *p) {
  GQA_RETURN_IF_ERROR(check_params(p));
  if (!p->causal || is_ragged(p) || p->cu_seqlens_k.data != nullptr) return GQA_STATUS_INVALID_ARGUMENT;
  if (p->seqlen_q < 1 || p->seqlen_q > kMaxDecodeQueries) return GQA_STATUS_UNSUPPORTED;
  if (p->k != nullptr && p->seqlen_k != p->seqlen_q) return GQA_STATUS_INVALID_ARGUMENT;
  return is_empty(p) || p->k_cache != nullptr ? GQA_STATUS_OK : GQA_STATUS_NULL_POINTER;
}

namespace {

int64_t cpu_rows(const gqa_attention_params *p) {
  return is_empty(p) ? 0 : (p->batch + is_ragged(p)) * p->num_kv_heads * cpu_query_blocks(p);
}

}  // namespace
}  // namespace gqa

extern "C" {

int64_t gqa_attention_prefill_rows(const gqa_attention_prefill_params *p) { return gqa::cpu_rows(p); }
int64_t gqa_attention_decode_rows(const gqa_attention_decode_params *p) { return gqa::cpu_rows(p); }

}  // extern "C"
