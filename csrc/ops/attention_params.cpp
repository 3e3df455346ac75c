#include "ops/attention_params.h"

#include <algorithm>
#include <climits>
#include <cmath>
#include <cstdio>

#include "ops/rotary.h"
#include "ops/run.h"

namespace gqa::ops {
namespace {

constexpr int64_t kMaxHeadDim = 256;

std::string number(double value) {
  char text[32];
  std::snprintf(text, sizeof(text), "%g", value);
  return text;
}

template <typename Wanted, typename Given>
void check_has(const char *op, bool condition, const char *name, const Wanted &wanted, const Given &given) {
  if (!condition) fail(op, std::string(name) + " must have " + text_of(wanted) + ", got " + text_of(given));
}

// Its shape, in words, if a check asks for it.
auto shape_of(const Tensor &tensor) {
  return [&tensor] { return "shape " + shape_string(tensor); };
}

int64_t dim_from_end(const Tensor &tensor, int64_t i) { return tensor.size(tensor.dim() - i); }

void check_together(const char *op, const char *name, const OptionalTensor &tensor, const char *other_name,
                    const OptionalTensor &other) {
  if (tensor && !other) fail(op, std::string(other_name) + " must be given together with " + name + ", got None");
  if (other && !tensor) fail(op, std::string(name) + " must be given together with " + other_name + ", got None");
}

void check_absent(const char *op, const char *name, bool present, const char *where) {
  if (present) fail(op, std::string(name) + " must be None " + where + ", got a value");
}

void check_index(const char *op, const char *name, const OptionalTensor &tensor, Sizes sizes, const char *layout,
                 const Tensor &like) {
  if (!tensor) return;
  check_index_dtype(op, name, *tensor);
  check_shape(op, name, *tensor, sizes, layout);
  check_same_device(op, name, *tensor, "q", like);
}

// Sorted by stride, each dimension must step over all that lies inside it.
bool overlaps_itself(const Tensor &tensor) {
  std::vector<std::pair<int64_t, int64_t>> dims;  // (stride, size)
  for (int64_t i = 0; i < tensor.dim(); ++i) {
    if (tensor.size(i) > 1) dims.emplace_back(tensor.stride(i), tensor.size(i));
  }
  std::sort(dims.begin(), dims.end());
  int64_t inside = 0;
  for (const auto &[stride, size] : dims) {
    if (stride <= inside) return true;
    inside += stride * (size - 1);
  }
  return false;
}

void check_one_cache(const char *op, const char *name, const Tensor &cache, const char *like_name, const Tensor &like,
                     bool writes) {
  check_cache_dtype(op, name, cache, like_name, like);
  check_same_device(op, name, cache, like_name, like);
  check_last_stride(op, name, cache);
  if (writes && cache.numel() > 0 && overlaps_itself(cache)) {
    fail(op, std::string(name) + " must not overlap itself where k is written to it, got " + name +
                 " expanded or overlapping");
  }
}

}  // namespace

void *pointer_to(const Tensor &tensor) {
  alignas(16) static char nothing[16];
  return tensor.numel() == 0 ? nothing : tensor.data_ptr();
}

gqa_index to_index(const OptionalTensor &tensor) {
  gqa_index index{};
  if (!tensor) return index;
  index.data = pointer_to(*tensor);
  index.dtype = gqa_dtype_of(*tensor);
  for (int64_t i = 0; i < tensor->dim(); ++i) index.stride[i] = tensor->size(i) == 1 ? 0 : tensor->stride(i);
  return index;
}

Tensor with_unit_stride(const Tensor &tensor, Kept *kept) {
  if (tensor.stride(tensor.dim() - 1) == 1) return tensor;
  kept->push_back(torch::stable::contiguous(tensor));
  return kept->back();
}

namespace {

// Rows start at multiples of 16 bytes and none stands for several, so that layout does not decide over the kernel.
Tensor with_aligned_rows(const Tensor &tensor, Kept *kept) {
  const Tensor rows = with_unit_stride(tensor, kept);
  const int64_t chunk = gqa_dtype_of(rows) == GQA_DTYPE_FLOAT32 ? 4 : 8;
  bool aligned = reinterpret_cast<uintptr_t>(pointer_to(rows)) % 16 == 0;
  for (int64_t i = 0; i + 1 < rows.dim(); ++i) {
    aligned = aligned && (rows.size(i) == 1 || (rows.stride(i) % chunk == 0 && rows.stride(i) != 0));
  }
  if (aligned) return rows;
  kept->push_back(new_tensor(rows, rows.sizes()));
  torch::stable::copy_(kept->back(), rows);
  return kept->back();
}

}  // namespace

void check_head_dim(const char *op, const char *name, const Tensor &tensor) {
  const int64_t head_dim = dim_from_end(tensor, 1);
  const int64_t nearest = std::clamp<int64_t>((head_dim + 7) / 8 * 8, 8, kMaxHeadDim);
  const auto wanted = [&] {
    return "a head_dim that is a multiple of 8 up to 256 (nearest supported: " + std::to_string(nearest) + ")";
  };
  check_has(op, head_dim == nearest, name, wanted, head_dim);
}

int64_t cache_capacity(const CacheArguments &cache) {
  const int64_t rows = cache.k_cache->size(1);
  return cache.block_table ? cache.block_table->size(1) * rows : rows;
}

void check_cache(const char *op, const CacheArguments &cache, int64_t batch, const char *like_name, const Tensor &like,
                 bool writes) {
  check_together(op, "k_cache", cache.k_cache, "v_cache", cache.v_cache);
  if (!cache.k_cache) {
    check_absent(op, "cache_seqlens", cache.cache_seqlens.has_value(), "without a k_cache");
    check_absent(op, "block_table", cache.block_table.has_value(), "without a k_cache");
  } else {
    const Tensor &k = *cache.k_cache, &v = *cache.v_cache;
    if (!cache.cache_seqlens) fail(op, "cache_seqlens must be given together with k_cache, got None");
    const int64_t head_dim = dim_from_end(like, 1);
    if (cache.block_table) {
      check_shape(op, "k_cache", k, {-1, -1, -1, head_dim}, "[pages, page_size, num_kv_heads, head_dim]");
      check_has(op, k.size(1) > 0, "k_cache", "a page size of at least 1", shape_of(k));
      check_index(op, "block_table", cache.block_table, {batch, -1}, "[batch, max_pages]", like);
    } else {
      check_shape(op, "k_cache", k, {batch, -1, -1, head_dim}, "[batch, capacity, num_kv_heads, head_dim]");
    }
    check_same_shape(op, "v_cache", v, "k_cache", k);
    check_one_cache(op, "k_cache", k, like_name, like, writes);
    check_one_cache(op, "v_cache", v, like_name, like, writes);
    check_same_dtype(op, "v_cache", v, "k_cache", k);
    if (cache.cache_seqlens->dim() != 0) {
      check_index(op, "cache_seqlens", cache.cache_seqlens, {batch}, "[batch]", like);
    } else {
      check_index(op, "cache_seqlens", cache.cache_seqlens, {}, "[]", like);
    }
  }
  check_index(op, "cache_leftpad", cache.cache_leftpad, {batch}, "[batch]", like);
  check_scales(op, cache, like_name, like);
}

void check_cache_heads(const char *op, const Tensor &k, const CacheArguments &cache) {
  const int64_t heads = cache.k_cache->size(2);
  const auto wanted = [&] { return "the " + std::to_string(heads) + " heads of k_cache"; };
  check_has(op, dim_from_end(k, 2) == heads, "k", wanted, shape_of(k));
}

void check_new_length(const char *op, int64_t seqlen, const CacheArguments &cache) {
  const int64_t capacity = cache_capacity(cache);
  const auto wanted = [&] { return "at most as many tokens as the cache has rows (" + std::to_string(capacity) + ")"; };
  check_has(op, seqlen <= capacity, "k", wanted, seqlen);
}

gqa_rotary to_rotary(const char *op, const RotaryArguments &rotary, int64_t batch, int64_t tokens,
                     const char *like_name, const Tensor &like, Kept *kept) {
  check_together(op, "rotary_cos", rotary.cos, "rotary_sin", rotary.sin);
  if (!rotary.cos) {
    check_absent(op, "rotary_positions", rotary.positions.has_value(), "without rotary_cos");
    return {};
  }
  const RotaryNames names{"rotary_cos", "rotary_sin", "rotary_positions", like_name, false};
  Rotary checked =
      as_rotary(op, like, batch, tokens, *rotary.cos, *rotary.sin, rotary.positions, rotary.interleaved, names);
  kept->insert(kept->end(), {checked.cos, checked.sin});
  // A table without rows is still a table: every position lies outside it.
  checked.params.cos = pointer_to(checked.cos);
  checked.params.sin = pointer_to(checked.sin);
  return checked.params;
}

void fill_strides(const Tensor &tensor, int64_t (*stride)[3]) {
  const int64_t dims = tensor.dim() - 1;
  for (int64_t i = 0; i < dims; ++i) (*stride)[3 - dims + i] = tensor.stride(i);
}

namespace {

void check_queries(const char *op, const AttentionArguments &args) {
  const Tensor &q = args.q;
  check_device(op, "q", q);
  check_float_dtype(op, "q", q);
  if (args.cu_seqlens_q) {
    check_rank(op, "q", q, {3}, "[tokens, num_q_heads, head_dim] with cu_seqlens_q");
  } else {
    check_rank(op, "q", q, {4}, "[batch, seqlen, num_q_heads, head_dim]");
  }
  check_head_dim(op, "q", q);
  check_has(op, dim_from_end(q, 2) > 0, "q", "at least one head", shape_of(q));
}

void check_offsets(const char *op, const char *name, const OptionalTensor &cu_seqlens, int64_t sequences,
                   const AttentionArguments &args) {
  if (!cu_seqlens) return;
  check_index(op, name, cu_seqlens, {sequences}, "[batch + 1]", args.q);
  check_has(op, cu_seqlens->size(0) > 0, name, "at least one offset", shape_of(*cu_seqlens));
}

void check_ragged(const char *op, const AttentionArguments &args) {
  check_offsets(op, "cu_seqlens_q", args.cu_seqlens_q, -1, args);
  if (!args.cu_seqlens_q) {
    check_absent(op, "cu_seqlens_k", args.cu_seqlens_k.has_value(), "without cu_seqlens_q");
    check_absent(op, "max_seqlen_q", args.max_seqlen_q.has_value(), "without cu_seqlens_q");
    check_absent(op, "max_seqlen_k", args.max_seqlen_k.has_value(), "without cu_seqlens_q");
  } else if (args.cache.k_cache) {
    check_absent(op, "cu_seqlens_k", args.cu_seqlens_k.has_value(), "with a k_cache: cu_seqlens_q divides k");
  } else if (!args.cu_seqlens_k) {
    fail(op, "cu_seqlens_k must be given together with cu_seqlens_q where there is no k_cache, got None");
  }
  if (args.cu_seqlens_q) check_offsets(op, "cu_seqlens_k", args.cu_seqlens_k, args.cu_seqlens_q->size(0), args);
  for (const auto &[name, value] :
       {std::pair{"max_seqlen_q", args.max_seqlen_q}, {"max_seqlen_k", args.max_seqlen_k}}) {
    if (value) check_value(op, *value >= 0, name, "0 or more", *value);
  }
}

int64_t batch_of(const AttentionArguments &args) {
  return args.cu_seqlens_q ? args.cu_seqlens_q->size(0) - 1 : args.q.size(0);
}

int64_t kv_heads_of(const AttentionArguments &args) {
  return args.cache.k_cache ? args.cache.k_cache->size(2) : dim_from_end(*args.k, 2);
}

void check_new_keys(const char *op, const AttentionArguments &args, int64_t new_tokens) {
  if (!args.k) return;
  const Tensor &k = *args.k, &q = args.q;
  const int64_t head_dim = dim_from_end(q, 1);
  if (args.cu_seqlens_q) {
    check_shape(op, "k", k, {args.cache.k_cache ? q.size(0) : -1, -1, head_dim}, "[tokens, num_kv_heads, head_dim]");
  } else {
    check_shape(op, "k", k, {q.size(0), new_tokens, -1, head_dim}, "[batch, seqlen, num_kv_heads, head_dim]");
  }
  if (args.cache.k_cache) check_cache_heads(op, k, args.cache);
  check_same_shape(op, "v", *args.v, "k", k);
  check_same_dtype(op, "k", k, "q", q);
  check_same_dtype(op, "v", *args.v, "q", q);
  check_same_device(op, "k", k, "q", q);
  check_same_device(op, "v", *args.v, "q", q);
}

void check_settings(const char *op, const AttentionArguments &args) {
  check_value(op, args.window_left >= -1 && args.window_right >= -1, "window_size",
              "(left, right), each -1 (unlimited) or more",
              [&] { return "(" + std::to_string(args.window_left) + ", " + std::to_string(args.window_right) + ")"; });
  check_value(op, args.softcap >= 0 && std::isfinite(args.softcap), "softcap", "0 (none) or more",
              [&] { return number(args.softcap); });
  if (args.softmax_scale) {
    check_value(op, std::isfinite(*args.softmax_scale), "softmax_scale", "finite",
                [&] { return number(*args.softmax_scale); });
  }
  check_value(op, args.num_splits >= 0, "num_splits", "0 (chosen) or more", args.num_splits);
  if (args.sinks) {
    check_shape(op, "sinks", *args.sinks, {dim_from_end(args.q, 2)}, "[num_q_heads]");
    check_weight_dtype(op, "sinks", *args.sinks, "q", args.q);
    check_same_device(op, "sinks", *args.sinks, "q", args.q);
  }
}

void check_attention_out(const char *op, const AttentionArguments &args, const Tensor &out) {
  check_out(op, "out", out, sizes_of(args.q), "q", args.q);
  check_value(op, reinterpret_cast<uintptr_t>(out.data_ptr()) % 16 == 0, "out", "aligned to 16 bytes", "less");
  check_apart(op, "out", out, "q", args.q, false);
  const char *names[] = {"k", "v", "k_cache", "v_cache"};
  const OptionalTensor *read[] = {&args.k, &args.v, &args.cache.k_cache, &args.cache.v_cache};
  for (int i = 0; i < 4; ++i) {
    if (*read[i]) check_apart(op, "out", out, names[i], **read[i], false);
  }
}

void check_attention(const char *op, const AttentionArguments &args, int64_t new_tokens) {
  check_queries(op, args);
  check_together(op, "k", args.k, "v", args.v);
  if (!args.k && !args.cache.k_cache) fail(op, "k must be given where there is no k_cache, got None");
  check_ragged(op, args);
  check_cache(op, args.cache, batch_of(args), "q", args.q, args.k.has_value());
  check_new_keys(op, args, new_tokens);
  const int64_t heads = dim_from_end(args.q, 2), kv_heads = kv_heads_of(args);
  const auto multiple = [&] {
    return "a number of heads that is a multiple of num_kv_heads = " + std::to_string(kv_heads);
  };
  check_has(op, kv_heads > 0 && heads % kv_heads == 0, "q", multiple, heads);
  if (args.cache.k_cache && args.k && !args.cu_seqlens_q) check_new_length(op, args.k->size(1), args.cache);
  const int64_t tokens = args.q.size(args.q.dim() - 3);
  const bool per_token = args.rotary.positions || (args.rotary.cos && args.rotary.cos->dim() == 3);
  if (per_token && args.k) {
    const int64_t new_keys = args.k->size(args.k->dim() - 3);
    const auto wanted = [&] {
      return "as long as q (" + std::to_string(tokens) + " tokens) where each token has its rotary position";
    };
    check_value(op, new_keys == tokens, "k", wanted, [&] { return std::to_string(new_keys) + " tokens"; });
  }
  check_settings(op, args);
  if (args.out) check_attention_out(op, args, *args.out);
}

}  // namespace

AttentionOutputs fill_attention(const char *op, const AttentionArguments &args, int64_t new_tokens,
                                gqa_attention_params *p, Kept *kept) {
  check_attention(op, args, new_tokens);
  const bool ragged = args.cu_seqlens_q.has_value();
  const Tensor q = with_aligned_rows(args.q, kept);
  const int64_t tokens = q.size(q.dim() - 3), batch = batch_of(args);
  p->struct_size = sizeof(*p);
  p->dtype = gqa_dtype_of(q);
  p->batch = batch;
  p->num_q_heads = static_cast<int32_t>(dim_from_end(q, 2));
  p->num_kv_heads = static_cast<int32_t>(kv_heads_of(args));
  p->head_dim = static_cast<int32_t>(dim_from_end(q, 1));
  p->q = pointer_to(q);
  fill_strides(q, &p->q_stride);
  p->total_q = ragged ? tokens : 0;
  p->seqlen_q = ragged ? std::min(tokens, args.max_seqlen_q.value_or(tokens)) : tokens;
  if (args.k) {
    const Tensor k = with_aligned_rows(*args.k, kept), v = with_aligned_rows(*args.v, kept);
    const int64_t new_keys = k.size(k.dim() - 3);
    p->k = pointer_to(k);
    p->v = pointer_to(v);
    fill_strides(k, &p->k_stride);
    fill_strides(v, &p->v_stride);
    p->total_k = ragged ? new_keys : 0;
    p->seqlen_k = !ragged              ? new_keys
                  : args.cache.k_cache ? p->seqlen_q
                                       : std::min(new_keys, args.max_seqlen_k.value_or(new_keys));
  }
  p->cu_seqlens_q = to_index(args.cu_seqlens_q);
  p->cu_seqlens_k = to_index(args.cu_seqlens_k);
  p->cache_leftpad = to_index(args.cache.cache_leftpad);
  fill_cache(args.cache, p);
  p->rotary = to_rotary(op, args.rotary, ragged ? 1 : batch, tokens, "q", args.q, kept);
  const auto clamp_window = [](int64_t window) { return static_cast<int32_t>(window > INT_MAX ? -1 : window); };
  p->causal = args.causal;
  p->window_left = clamp_window(args.window_left);
  p->window_right = clamp_window(args.window_right);
  p->softmax_scale = static_cast<float>(args.softmax_scale.value_or(1.0 / std::sqrt(static_cast<double>(p->head_dim))));
  p->softcap = static_cast<float>(args.softcap);
  p->num_splits = static_cast<int32_t>(std::min<int64_t>(args.num_splits, INT_MAX));
  p->batch_invariant = args.batch_invariant;
  if (args.sinks) {
    kept->push_back(torch::stable::contiguous(*args.sinks));
    p->sinks = kept->back().data_ptr();
    p->sinks_dtype = gqa_dtype_of(kept->back());
  }
  const Tensor out = args.out ? *args.out : new_contiguous(q);
  p->out = pointer_to(out);
  fill_strides(out, &p->out_stride);
  const int64_t heads = p->num_q_heads;
  const Tensor lse = !args.return_lse ? new_tensor(q, {0}, ScalarType::Float)
                     : ragged         ? new_tensor(q, {heads, tokens}, ScalarType::Float)
                                      : new_tensor(q, {batch, heads, tokens}, ScalarType::Float);
  if (args.return_lse) p->lse = static_cast<float *>(pointer_to(lse));
  return {args.out ? new_tensor(q, {0}) : out, lse};
}

int64_t cpu_row_cost(const gqa_attention_params &p) {
  const int64_t keys = std::min<int64_t>(p.cache_capacity + p.seqlen_k, 4096);
  const int64_t queries = std::min<int64_t>(p.seqlen_q, 32) * (p.num_q_heads / p.num_kv_heads);
  return queries * p.head_dim * std::max<int64_t>(1, keys / 16);
}

}  // namespace gqa::ops
