// What the attention ops and kv_cache_append share: checks of caches, rotary tables and common arguments, and the
// params they fill.
#pragma once

#include <optional>
#include <vector>

#include "ops/checks.h"

namespace gqa::ops {

using OptionalTensor = std::optional<Tensor>;

// Tensors made for the call (contiguous copies), alive until it has been launched.
using Kept = std::vector<Tensor>;

struct CacheArguments {
  OptionalTensor k_cache, v_cache, cache_seqlens, cache_leftpad, block_table, k_scale, v_scale;
};

struct RotaryArguments {
  OptionalTensor cos, sin, positions;
  bool interleaved = false;
};

struct AttentionArguments {
  Tensor q;
  OptionalTensor k, v;
  CacheArguments cache;
  OptionalTensor cu_seqlens_q, cu_seqlens_k;
  std::optional<int64_t> max_seqlen_q, max_seqlen_k;
  RotaryArguments rotary;
  std::optional<double> softmax_scale;
  int64_t window_left, window_right;
  double softcap;
  OptionalTensor sinks;
  int64_t num_splits;
  bool batch_invariant, return_lse;
  OptionalTensor workspace;
  OptionalTensor out;
  bool causal;
  bool decode = false;
};

struct AttentionOutputs {
  Tensor out, lse;  // of size 0: the caller's own out; an lse that was not asked for
};

// Never NULL: an empty tensor is not an absent one.
void *pointer_to(const Tensor &tensor);
// A stride of 0 broadcasts a 0-d tensor or a dimension of size 1.
gqa_index to_index(const OptionalTensor &tensor);
// As it is where its last dimension is contiguous, else a copy that lives in `kept`.
Tensor with_unit_stride(const Tensor &tensor, Kept *kept);

void check_head_dim(const char *op, const char *name, const Tensor &tensor);
// Caches that hold `batch` sequences with the device, head_dim and dtype of `like`, or quantised ones for a 16-bit
// dtype, with their scales; `writes`: new rows go into them.
void check_cache(const char *op, const CacheArguments &cache, int64_t batch, const char *like_name, const Tensor &like,
                 bool writes);
// New keys of the cache's number of heads, and what the host can see of an overflow.
void check_cache_heads(const char *op, const Tensor &k, const CacheArguments &cache);
void check_new_length(const char *op, int64_t seqlen, const CacheArguments &cache);
// Tables for `tokens` tokens in each of `batch` sequences, checked; ragged tokens count as one sequence.
gqa_rotary to_rotary(const char *op, const RotaryArguments &rotary, int64_t batch, int64_t tokens,
                     const char *like_name, const Tensor &like, Kept *kept);

// Rows of a contiguous cache, or of the pages that a block table can name.
int64_t cache_capacity(const CacheArguments &cache);

// The dtype of `like`, or a quantised one where that serves it.
void check_cache_dtype(const char *op, const char *name, const Tensor &cache, const char *like_name,
                       const Tensor &like);
void check_scales(const char *op, const CacheArguments &cache, const char *like_name, const Tensor &like);
gqa_kv_quantization to_quantization(const CacheArguments &cache);

// Works for both params structs.
template <typename Params>
void fill_cache(const CacheArguments &cache, Params *p) {
  if (!cache.k_cache) return;
  const Tensor &k = *cache.k_cache, &v = *cache.v_cache;
  p->k_cache = pointer_to(k);
  p->v_cache = pointer_to(v);
  p->cache_seqlens = to_index(cache.cache_seqlens);
  p->cache_capacity = cache_capacity(cache);
  p->quantization = to_quantization(cache);
  if (cache.block_table) {
    p->block_table = to_index(cache.block_table);
    p->num_pages = k.size(0);
    p->page_size = k.size(1);
  }
  for (int i = 0; i < 3; ++i) {
    p->k_cache_stride[i] = k.stride(i);
    p->v_cache_stride[i] = v.stride(i);
  }
}

// Strides of batch, token and head; a ragged tensor has no batch.
void fill_strides(const Tensor &tensor, int64_t (*stride)[3]);

// Checks everything, allocates the outputs and fills all of p but the workspace. `new_tokens`: what the length of k
// must be, -1 for any.
AttentionOutputs fill_attention(const char *op, const AttentionArguments &args, int64_t new_tokens,
                                gqa_attention_params *p, Kept *kept);
// The caller's workspace, or one for this call, where a CUDA kernel needs one.
void prepare_workspace(const char *op, const AttentionArguments &args,
                       int64_t (*size)(const gqa_attention_params *, const gqa_device *), gqa_attention_params *p,
                       Kept *kept);
// Elements that one row of the CPU twin touches, roughly.
int64_t cpu_row_cost(const gqa_attention_params &p);

}  // namespace gqa::ops
