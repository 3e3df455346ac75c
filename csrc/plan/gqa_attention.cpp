#include "plan/gqa_attention.h"

#include <algorithm>
#include <cmath>

#include "plan/plan.h"
#include "plan/tensors.h"

namespace gqa {
namespace {

constexpr int32_t kMaxHeadDim = 256;
constexpr int64_t kMaxDecodeQueries = 16;
constexpr int64_t kMaxKeys = INT32_MAX - 4096;  // key positions are int32 in the kernels
constexpr int64_t kMaxRows = INT32_MAX / 4;     // and so are a KV head's rows
constexpr int32_t kMaxSplits = 128;
constexpr int64_t kShortKeys = 1024;
constexpr int32_t kInvariantSplits = 16;
constexpr int32_t kInvariantChunk = 256;

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
  GQA_RETURN_IF_ERROR(check_quantization(p->quantization, p->dtype, p->head_dim));
  if (p->quantization.dtype != 0 && p->k_cache == nullptr) return GQA_STATUS_INVALID_ARGUMENT;
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

// The first shape wide enough that takes all rows in one block if `one_block` says so, else the one for many rows.
int find_shape(int32_t head_dim, int64_t rows, bool one_block) {
  int dim = 0;
  while (kAttentionShapes[dim].dim < head_dim) ++dim;
  for (const int shape : {dim, 2 * kAttentionDims + dim}) {
    if (one_block && shape < kAttentionShapeCount && rows <= kAttentionShapes[shape].rows()) return shape;
  }
  return kAttentionDims + dim;
}

// The most keys that one block of rows can attend to.
int64_t most_keys(const gqa_attention_params *p) {
  const int64_t keys = p->k_cache != nullptr ? p->cache_capacity : p->seqlen_k;
  const int64_t right = p->causal ? 0 : p->window_right;
  return p->window_left >= 0 && right >= 0 ? std::min(keys, p->window_left + right + p->seqlen_q) : keys;
}

// Blocks of a shape that one SM holds: by shared memory (1 KB of each block is the system's) and by registers.
int64_t resident_blocks(const AttentionShape &shape, const gqa_device &device) {
  const int64_t by_memory = (device.max_shared_memory + 1024) / (shape.shared_memory() + 1024);
  return std::clamp<int64_t>(by_memory, 1, shape.resident);
}

void plan_splits(const gqa_attention_params *p, const gqa_device &device, AttentionPlan *plan) {
  const AttentionShape &shape = kAttentionShapes[plan->shape];
  const int64_t keys = most_keys(p);
  plan->min_chunk = kSplitUnit;
  if (p->num_splits > 0) {
    plan->num_splits = std::min<int32_t>(p->num_splits, kMaxSplits);
    plan->plan.reason = "the number of splits was given";
  } else if (p->batch_invariant) {
    // Many rows fill the device without splits, at any batch.
    const bool few_rows = !is_ragged(p) && plan->row_blocks == 1;
    plan->min_chunk = kInvariantChunk;
    plan->divisor = kInvariantSplits;
    plan->num_splits =
        few_rows ? std::clamp<int64_t>(ceil_div<int64_t>(keys + kSplitUnit, kInvariantChunk), 1, kInvariantSplits) : 1;
    if (few_rows) {
      plan->plan.reason = "batch_invariant: splits follow each row's own length";
      return;
    }
    plan->plan.reason = "batch_invariant: many rows, so no splits";
  } else {
    const int64_t blocks = p->batch * p->num_kv_heads * plan->row_blocks;
    // A block of many rows that has an SM for itself is through few keys sooner than two that share them and it.
    const bool alone = shape.groups == 1 && keys / kCapacityUnit <= kShortKeys / kCapacityUnit;
    const int64_t slots = device.num_sms * (alone ? 1 : resident_blocks(shape, device));
    // Rounded down, so that a cache in pages, whose last one may reach past a contiguous cache of that capacity, is
    // divided like that one and gives the same bytes.
    plan->num_splits = choose_splits(blocks, slots, keys / kCapacityUnit * kCapacityUnit);
    plan->plan.reason = shape.groups > 1 ? "few rows per KV head: warps divide the keys"
                                         : "many rows per KV head: warps divide the rows";
  }
  plan->divisor = plan->num_splits;
}

// The launch that comes first where there are new keys to rotate or to put into the cache.
gqa_status plan_new_keys(const char *name, const gqa_attention_params *p, AttentionPlan *plan) {
  // An append with a place to go to; rotation without a cache takes a detour through the workspace.
  const bool new_keys = p->k != nullptr && key_tokens(p) > 0;
  const bool room = p->cache_capacity > 0 && (p->block_table.data == nullptr || p->num_pages > 0);
  plan->appends = new_keys && p->k_cache != nullptr && room;
  plan->rotates = new_keys && p->k_cache == nullptr && p->rotary.cos != nullptr;
  if (plan->appends || plan->rotates) {
    const int64_t tokens = p->batch * (is_ragged(p) && p->k_cache != nullptr ? p->seqlen_q : p->seqlen_k);
    const int64_t blocks = ceil_div<int64_t>(tokens * p->num_kv_heads * (p->head_dim / 8), 256);
    if (blocks > INT32_MAX) return GQA_STATUS_UNSUPPORTED;
    const char *kernel = plan->appends ? "append_chunks" : "rotate_chunks";
    if (blocks > 0) add_launch(&plan->plan, make_launch(name, kernel, p->dtype, {blocks}, {256}));
    plan->appends = plan->appends && blocks > 0;
    plan->rotates = plan->rotates && blocks > 0;
  }
  return GQA_STATUS_OK;
}

gqa_status plan_nonempty(AttentionOp op, const gqa_attention_params *p, const gqa_device &device, AttentionPlan *plan) {
  const char *name = op == AttentionOp::kDecode ? "gqa_attention_decode" : "gqa_attention_prefill";
  const int64_t group = p->num_q_heads / p->num_kv_heads;
  const int64_t head_bytes = p->head_dim * dtype_size(p->dtype);
  const int64_t longest = is_ragged(p) ? std::min(p->seqlen_q, p->total_q) : p->seqlen_q;
  const int64_t keys = p->k_cache != nullptr ? p->cache_capacity : p->seqlen_k;
  if (keys > kMaxKeys || query_tokens(p) * p->num_q_heads > kMaxRows) return GQA_STATUS_UNSUPPORTED;
  if (p->page_size > INT32_MAX || p->num_pages > INT32_MAX) return GQA_STATUS_UNSUPPORTED;

  const bool halves = p->dtype != GQA_DTYPE_FLOAT32;
  const bool decodes = op == AttentionOp::kDecode;
  const char *refusal = decodes ? refuse_decode_sm90(p, &device) : refuse_prefill_sm90(p, &device);
  if (refusal == nullptr && !decodes) {
    plan->wgmma = true;
    GQA_RETURN_IF_ERROR(plan_new_keys(name, p, plan));
    if (query_tokens(p) == 0) return GQA_STATUS_OK;
    plan->prefill = plan_prefill_sm90(p, &device);
    const PrefillShape &tile = kPrefillShapes[plan->prefill.shape];
    add_launch(&plan->plan, make_launch(name, "prefill_wgmma", p->dtype, {plan->prefill.blocks}, {tile.threads()},
                                        tile.shared_memory(), plan->prefill.shape));
    plan->plan.reason = "many rows on sm_90: warpgroups take turns at the tensor cores";
    return GQA_STATUS_OK;
  }
  if (refusal == nullptr) {
    const int64_t capacity = std::max<int64_t>(kCapacityUnit, most_keys(p) / kCapacityUnit * kCapacityUnit);
    plan->clusters = true;
    plan->decode = plan_decode_sm90(p, &device, capacity);
    const DecodePlan &decode = plan->decode;
    gqa_launch launch = make_launch(name, "decode_ring", p->dtype, {decode.grid[0], decode.grid[1], decode.grid[2]},
                                    {32 * kDecodeShapes[decode.shape].warps}, decode.shared_memory,
                                    6 * decode.shape + 2 * static_cast<int>(decode.cache) + decode.plain);
    launch.num_splits = decode.cluster;
    add_launch(&plan->plan, launch);
    plan->plan.reason = "few rows per KV head on sm_90: a cluster of blocks divides the keys";
    return GQA_STATUS_OK;
  }
  plan->shape = find_shape(p->head_dim, longest * group, !(p->batch_invariant && is_ragged(p)));
  const AttentionShape &shape = kAttentionShapes[plan->shape];
  const bool few_rows = shape.groups > 1;
  plan->row_blocks = std::max<int64_t>(1, ceil_div<int64_t>(longest * group, halves ? shape.rows() : kFloatRows));
  plan->num_splits = plan->divisor = 1;
  if (halves) {
    plan_splits(p, device, plan);
    if (device.compute_capability == 90 && p->num_splits <= 1 && !p->batch_invariant) {
      plan->plan.reason = refusal;
    }
  } else {
    plan->plan.reason = "float32 runs on the CUDA cores, one warp per row";
  }

  GQA_RETURN_IF_ERROR(plan_new_keys(name, p, plan));
  if (query_tokens(p) == 0) return GQA_STATUS_OK;

  const int64_t blocks = (p->batch + is_ragged(p)) * plan->row_blocks * plan->num_splits * p->num_kv_heads;
  if (blocks > INT32_MAX) return GQA_STATUS_UNSUPPORTED;
  gqa_launch launch = halves ? make_launch(name, few_rows ? "attend_few_rows" : "attend_many_rows", p->dtype, {blocks},
                                           {shape.threads()}, shape.shared_memory(), plan->shape)
                             : make_launch(name, "attend_float32", p->dtype, {blocks}, {32 * kFloatRows});
  launch.num_splits = plan->num_splits;
  add_launch(&plan->plan, launch);

  const int64_t rows = query_tokens(p) * p->num_q_heads;
  const bool combines = plan->num_splits > 1;
  if (combines) {
    const int64_t joins = ceil_div<int64_t>(rows, combine_rows(plan->num_splits));
    launch = make_launch(name, "combine_splits", p->dtype, {joins}, {32 * kCombineWarps});
    launch.num_splits = plan->num_splits;
    add_launch(&plan->plan, launch);
  }
  plan->partial_sum = plan->rotates ? round_up(key_tokens(p) * p->num_kv_heads * head_bytes, 256) : 0;
  plan->partial_out = plan->partial_sum + (combines ? round_up(plan->num_splits * rows * 8, 256) : 0);
  plan->plan.workspace_size = plan->partial_out + (combines ? plan->num_splits * rows * p->head_dim * 4 : 0);
  return GQA_STATUS_OK;
}

gqa_status plan_only(AttentionOp op, const gqa_attention_params *p, const gqa_device *device, gqa_plan *plan) {
  AttentionPlan attention;
  GQA_RETURN_IF_ERROR(plan_attention(op, p, device, &attention));
  *plan = attention.plan;
  return GQA_STATUS_OK;
}

int64_t workspace_size(AttentionOp op, const gqa_attention_params *p, const gqa_device *device) {
  AttentionPlan attention;
  return plan_attention(op, p, device, &attention) == GQA_STATUS_OK ? attention.plan.workspace_size : 0;
}

}  // namespace

int32_t choose_splits(int64_t blocks, int64_t slots, int64_t max_keys) {
  const int64_t limit = std::clamp<int64_t>(max_keys / (2 * kSplitUnit), 1, kMaxSplits);
  if (blocks == 0 || 5 * blocks >= 4 * slots) return 1;
  const auto filled = [&](int64_t splits) {
    const int64_t work = blocks * splits;
    return static_cast<double>(work) / static_cast<double>(ceil_div(work, slots) * slots);
  };
  double best = 0;
  for (int64_t splits = 1; splits <= limit; ++splits) best = std::max(best, filled(splits));
  int64_t splits = 1;
  while (filled(splits) < 0.85 * best) ++splits;
  return static_cast<int32_t>(splits);
}

gqa_status plan_attention(AttentionOp op, const gqa_attention_params *p, const gqa_device *device,
                          AttentionPlan *plan) {
  GQA_RETURN_IF_ERROR(op == AttentionOp::kDecode ? check_attention_decode(p) : check_attention_prefill(p));
  *plan = {};
  if (is_empty(p)) return GQA_STATUS_OK;
  constexpr gqa_device kH200{90, 132, 227 * 1024, 50 << 20};
  GQA_RETURN_IF_ERROR(plan_nonempty(op, p, device != nullptr ? *device : kH200, plan));
  for (int i = 0; i < plan->plan.num_launches; ++i) name_quantized(p->quantization.dtype, &plan->plan.launches[i]);
  return GQA_STATUS_OK;
}

}  // namespace gqa

extern "C" {

int64_t gqa_attention_prefill_rows(const gqa_attention_prefill_params *p) { return gqa::cpu_rows(p); }
int64_t gqa_attention_decode_rows(const gqa_attention_decode_params *p) { return gqa::cpu_rows(p); }

gqa_status gqa_attention_prefill_plan(const gqa_attention_prefill_params *p, const gqa_device *device, gqa_plan *plan) {
  return gqa::plan_only(gqa::AttentionOp::kPrefill, p, device, plan);
}

gqa_status gqa_attention_decode_plan(const gqa_attention_decode_params *p, const gqa_device *device, gqa_plan *plan) {
  return gqa::plan_only(gqa::AttentionOp::kDecode, p, device, plan);
}

int64_t gqa_attention_prefill_workspace_size(const gqa_attention_prefill_params *p, const gqa_device *device) {
  return gqa::workspace_size(gqa::AttentionOp::kPrefill, p, device);
}

int64_t gqa_attention_decode_workspace_size(const gqa_attention_decode_params *p, const gqa_device *device) {
  return gqa::workspace_size(gqa::AttentionOp::kDecode, p, device);
}

}  // extern "C"
