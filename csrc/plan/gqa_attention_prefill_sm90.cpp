#include "plan/gqa_attention_prefill_sm90.h"

#include <algorithm>
#include <cstring>

#include "common/status.h"
#include "plan/gqa_attention_decode_sm90.h"
#include "plan/plan.h"

namespace gqa {
namespace {

constexpr int64_t kMinQueries = 64;               // rows of one warpgroup
constexpr int64_t kLongKeys = 1024;               // more, and few tiles are slower than splits
constexpr int64_t kMaxLength = 1 << 30;           // tokens
constexpr int64_t kMaxStride = int64_t{1} << 38;  // of a tensor map, in elements
constexpr int64_t kSectionBytes = 24 << 20;       // half of the L2

// Strides of dimensions with one element say nothing.
bool is_aligned(const void *pointer, const int64_t *stride, const int64_t (&size)[3]) {
  for (int i = 0; i < 3; ++i) {
    if (size[i] > 1 && stride[i] % 8 != 0) return false;
  }
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

bool is_mappable(const int64_t *stride, const int64_t (&size)[3]) {
  for (int i = 0; i < 3; ++i) {
    if (size[i] > 1 && (stride[i] <= 0 || stride[i] >= kMaxStride)) return false;
  }
  return true;
}

int find_shape(const gqa_attention_params *p) {
  int shape = 0;
  while (shape < kPrefillShapeCount && kPrefillShapes[shape].dim != p->head_dim) ++shape;
  return shape;
}

int64_t count_tiles(const gqa_attention_params *p, const PrefillShape &shape) {
  return p->batch * p->num_q_heads * ceil_div<int64_t>(p->seqlen_q, shape.rows());
}

// Code for the device is in this library, or the library is built without CUDA and only asked what would run.
bool has_code() {
  const char *archs = gqa_cuda_archs();
  return archs[0] == '\0' || std::strstr(archs, "90a") != nullptr;
}

bool is_dense(const gqa_attention_params *p) {
  return p->k != nullptr && p->k_cache == nullptr && p->cu_seqlens_q.data == nullptr &&
         p->cu_seqlens_k.data == nullptr && p->cache_leftpad.data == nullptr && p->rotary.cos == nullptr;
}

}  // namespace

const char *refuse_prefill_sm90(const gqa_attention_params *p, const gqa_device *device) {
  if (is_portable_asked_for()) return "the portable kernels were asked for";
  if (device->compute_capability != 90 || !has_code()) return "wgmma needs compute capability 9.0 and code for sm_90a";
  if (p->dtype == GQA_DTYPE_FLOAT32) return "float32 runs on the CUDA cores, one warp per row";
  const int shape = find_shape(p);
  if (shape >= kPrefillShapeCount) return "wgmma tiles take head_dim 64 and 128";
  if (device->max_shared_memory < kPrefillShapes[shape].shared_memory()) return "wgmma tiles need more shared memory";
  if (p->num_splits > 0) return "the number of splits was given";
  if (p->batch_invariant) return "batch_invariant: dense and ragged batches run the same kernel";
  if (!is_dense(p)) return "wgmma tiles take dense q, k and v without a cache or rotary embedding";
  if (p->causal || p->window_left >= 0 || p->window_right >= 0) return "wgmma tiles take full attention";
  if (p->softcap > 0 || p->sinks != nullptr || !(p->softmax_scale > 0)) {
    return "wgmma tiles take a positive scale, and neither softcap nor sinks";
  }
  if (p->seqlen_q < kMinQueries || p->seqlen_k < 1) return "wgmma tiles take at least 64 queries, and keys";
  if (p->seqlen_q >= kMaxLength || p->seqlen_k >= kMaxLength) return "wgmma tiles take lengths below 2^30";
  if (p->seqlen_k > kLongKeys && 3 * count_tiles(p, kPrefillShapes[shape]) < device->num_sms) {
    return "few rows and long keys: splits fill the device, wgmma tiles do not";
  }
  const int64_t queries[3] = {p->batch, p->seqlen_q, p->num_q_heads};
  const int64_t keys[3] = {p->batch, p->seqlen_k, p->num_kv_heads};
  if (!is_aligned(p->q, p->q_stride, queries) || !is_aligned(p->out, p->out_stride, queries) ||
      !is_aligned(p->k, p->k_stride, keys) || !is_aligned(p->v, p->v_stride, keys)) {
    return "wgmma tiles take rows that start at multiples of 16 bytes";
  }
  if (!is_mappable(p->q_stride, queries) || !is_mappable(p->k_stride, keys) || !is_mappable(p->v_stride, keys)) {
    return "wgmma tiles take neither expanded tensors nor strides of 2^38";
  }
  return nullptr;
}

PrefillPlan plan_prefill_sm90(const gqa_attention_params *p, const gqa_device *device) {
  PrefillPlan plan{};
  plan.shape = find_shape(p);
  const PrefillShape &shape = kPrefillShapes[plan.shape];
  plan.row_tiles = static_cast<int32_t>(ceil_div<int64_t>(p->seqlen_q, shape.rows()));
  plan.tiles = static_cast<int32_t>(count_tiles(p, shape));
  plan.blocks = std::min(plan.tiles, device->num_sms);
  const int64_t pairs = p->batch * p->num_kv_heads;
  const int64_t fit = std::max<int64_t>(1, kSectionBytes / (4 * p->seqlen_k * shape.dim));
  const int64_t section = ceil_div(pairs, ceil_div(pairs, fit));
  plan.section = static_cast<int32_t>(section * (p->num_q_heads / p->num_kv_heads));
  return plan;
}

}  // namespace gqa
