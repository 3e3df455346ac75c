#include "plan/gqa_attention_prefill_sm90.h"

#include <algorithm>
#include <cstring>

#include "common/status.h"
#include "plan/gqa_attention_decode_sm90.h"
#include "plan/plan.h"
#include "plan/tensors.h"

namespace gqa {
namespace {

constexpr int64_t kMinQueries = 64;               // rows of one warpgroup
constexpr int64_t kLongKeys = 1024;               // more, and few tiles are slower than splits
constexpr int64_t kMaxLength = 1 << 30;           // tokens
constexpr int64_t kMaxStride = int64_t{1} << 38;  // of a tensor map, in elements
constexpr int32_t kMinPageRows = 16;
constexpr int64_t kManyTiles = 2;            // for each multiprocessor: fewer, and smaller ones share out better
constexpr int64_t kSectionBytes = 24 << 20;  // half of the L2

bool is_mappable(const int64_t *stride, const int64_t (&size)[3]) {
  for (int i = 0; i < 3; ++i) {
    if (size[i] > 1 && (stride[i] <= 0 || stride[i] >= kMaxStride)) return false;
  }
  return true;
}

bool is_paged(const gqa_attention_params *p) { return p->block_table.data != nullptr; }
bool is_ragged(const gqa_attention_params *p) { return p->cu_seqlens_q.data != nullptr; }
bool is_packed(const gqa_attention_params *p) { return p->k_cache == nullptr && p->cu_seqlens_k.data != nullptr; }

int64_t longest_queries(const gqa_attention_params *p) {
  return is_ragged(p) ? std::min(p->seqlen_q, p->total_q) : p->seqlen_q;
}

// The most keys that a sequence can have.
int64_t longest_keys(const gqa_attention_params *p) {
  return p->k_cache != nullptr ? p->cache_capacity : (is_packed(p) ? std::min(p->seqlen_k, p->total_k) : p->seqlen_k);
}

int64_t all_heads(const gqa_attention_params *p) { return (p->batch + is_ragged(p)) * p->num_q_heads; }

int64_t count_row_tiles(const gqa_attention_params *p, const PrefillShape &shape) {
  return std::max<int64_t>(1, ceil_div<int64_t>(longest_queries(p), shape.rows()));
}

// Tiles that have work, if sequences are as long as they can be; of a ragged batch the tokens are known.
int64_t count_full_tiles(const gqa_attention_params *p, const PrefillShape &shape) {
  const int64_t of_tokens = p->total_q / shape.rows() * p->num_q_heads;
  const int64_t of_sequences = p->batch * p->num_q_heads * count_row_tiles(p, shape);
  return is_ragged(p) ? std::min(of_tokens, of_sequences) : of_sequences;
}

int find_shape(const gqa_attention_params *p, const gqa_device *device) {
  int shape = 0;
  while (shape < kPrefillShapeCount && kPrefillShapes[shape].dim < p->head_dim) ++shape;
  if (shape + 1 >= kPrefillShapeCount || kPrefillShapes[shape + 1].dim != kPrefillShapes[shape].dim) return shape;
  const PrefillShape &large = kPrefillShapes[shape + 1];
  const bool masked = p->causal || p->window_left >= 0 || p->window_right >= 0 || is_paged(p);
  const bool fills = large.rows() > kPrefillShapes[shape].rows()
                         ? count_full_tiles(p, large) >= kManyTiles * device->num_sms
                         : !masked;
  return shape + fills;
}

// Rows of pages are copied in powers of two that divide a block of keys.
int32_t find_page_rows(const gqa_attention_params *p, const PrefillShape &shape) {
  if (!is_paged(p)) return 0;
  return static_cast<int32_t>(std::min<int64_t>(shape.keys & -shape.keys, p->page_size & -p->page_size));
}

// Code for the device is in this library, or the library is built without CUDA and only asked what would run.
bool has_code() {
  const char *archs = gqa_cuda_archs();
  return archs[0] == '\0' || std::strstr(archs, "90a") != nullptr;
}

}  // namespace

const char *refuse_prefill_sm90(const gqa_attention_params *p, const gqa_device *device) {
  if (is_portable_asked_for()) return "the portable kernels were asked for";
  if (device->compute_capability != 90 || !has_code()) return "wgmma needs compute capability 9.0 and code for sm_90a";
  if (p->dtype == GQA_DTYPE_FLOAT32) return "float32 runs on the CUDA cores, one warp per row";
  if (p->quantization.dtype != 0) return "quantised caches are widened on their way to the portable kernels";
  const int shape = find_shape(p, device);
  if (shape >= kPrefillShapeCount) return "wgmma tiles take head_dim up to 256";
  if (device->max_shared_memory < kPrefillShapes[shape].shared_memory()) return "wgmma tiles need more shared memory";
  if (p->num_splits > 1) return "the number of splits was given";
  if (p->batch_invariant) return "batch_invariant: few and many rows run the same kernel";
  if (p->rotary.cos != nullptr) return "wgmma tiles take rotated q and k";
  if (is_paged(p) && find_page_rows(p, kPrefillShapes[shape]) < kMinPageRows)
    return "wgmma tiles take pages of multiples of 16 rows";
  // Outside of a page is NaN, columns too.
  if (is_paged(p) && kPrefillShapes[shape].dim != p->head_dim) return "wgmma tiles take pages of their own width";
  const int64_t longest_q = longest_queries(p), longest_k = longest_keys(p);
  if (longest_q < kMinQueries || longest_k < 1) return "wgmma tiles take at least 64 queries, and keys";
  if (is_paged(p) && p->num_pages < 1) return "wgmma tiles take at least one page";
  if (p->seqlen_q >= kMaxLength || longest_k >= kMaxLength || p->total_q >= kMaxLength || p->total_k >= kMaxLength) {
    return "wgmma tiles take lengths below 2^30";
  }
  if (all_heads(p) * count_row_tiles(p, kPrefillShapes[shape]) > kMaxLength) return "wgmma tiles are less than 2^30";
  if (longest_k > kLongKeys && 3 * count_full_tiles(p, kPrefillShapes[shape]) < device->num_sms) {
    return "few rows and long keys: splits fill the device, wgmma tiles do not";
  }
  const bool cached = p->k_cache != nullptr;
  const void *k = cached ? p->k_cache : p->k, *v = cached ? p->v_cache : p->v;
  const int64_t *k_stride = cached ? p->k_cache_stride : p->k_stride;
  const int64_t *v_stride = cached ? p->v_cache_stride : p->v_stride;
  const int64_t queries[3] = {is_ragged(p) ? 1 : p->batch, is_ragged(p) ? p->total_q : p->seqlen_q, p->num_q_heads};
  const int64_t outer = is_paged(p) ? p->num_pages : (is_packed(p) ? 1 : p->batch);
  if (outer < 1) return "wgmma tiles take at least one sequence";
  const int64_t tokens = is_paged(p) ? p->page_size : (is_packed(p) ? p->total_k : longest_k);
  const int64_t keys[3] = {outer, tokens, p->num_kv_heads};
  if (!is_aligned(p->q, p->q_stride, queries) || !is_aligned(p->out, p->out_stride, queries) ||
      !is_aligned(k, k_stride, keys) || !is_aligned(v, v_stride, keys)) {
    return "wgmma tiles take rows that start at multiples of 16 bytes";
  }
  if (!is_mappable(p->q_stride, queries) || !is_mappable(k_stride, keys) || !is_mappable(v_stride, keys)) {
    return "wgmma tiles take neither expanded tensors nor strides of 2^38";
  }
  return nullptr;
}

PrefillPlan plan_prefill_sm90(const gqa_attention_params *p, const gqa_device *device) {
  PrefillPlan plan{};
  plan.shape = find_shape(p, device);
  const PrefillShape &shape = kPrefillShapes[plan.shape];
  plan.row_tiles = static_cast<int32_t>(count_row_tiles(p, shape));
  plan.tiles = static_cast<int32_t>(all_heads(p) * plan.row_tiles);
  plan.blocks = std::min(plan.tiles, device->num_sms);
  plan.page_rows = find_page_rows(p, shape);
  const int64_t pairs = all_heads(p) / (p->num_q_heads / p->num_kv_heads);
  const int64_t fit = std::max<int64_t>(1, kSectionBytes / (4 * longest_keys(p) * shape.dim));
  const int64_t section = ceil_div(pairs, ceil_div(pairs, fit));
  plan.section = static_cast<int32_t>(section * (p->num_q_heads / p->num_kv_heads));
  return plan;
}

}  // namespace gqa
