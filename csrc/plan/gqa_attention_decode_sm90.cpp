#include "plan/gqa_attention_decode_sm90.h"

#include <algorithm>

namespace gqa {
namespace {

constexpr int64_t kTile = 16;        // keys
constexpr int64_t kMaxRows = 16;     // query tokens times heads of the group
constexpr int64_t kMaxCluster = 16;  // blocks
constexpr int64_t kMaxGrid = 65535;  // in y and z
constexpr int64_t kMaxInt = 0x7fffffff - 64;

int64_t query_rows(const gqa_attention_params *p) { return p->seqlen_q * (p->num_q_heads / p->num_kv_heads); }

bool is_aligned(const void *pointer, const int64_t *stride) {
  if (pointer == nullptr) return true;
  const bool strides = stride[0] % 8 == 0 && stride[1] % 8 == 0 && stride[2] % 8 == 0;
  return strides && reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

bool fits_rows(const int64_t *stride) { return stride[1] >= 0 && stride[1] <= kMaxInt / 2; }

}  // namespace

bool decode_sm90_supports(const gqa_attention_params *p, const gqa_device *device) {
  const bool half = p->dtype == GQA_DTYPE_FLOAT16 || p->dtype == GQA_DTYPE_BFLOAT16;
  const bool sizes = p->head_dim % 8 == 0 && p->head_dim <= 256 && query_rows(p) <= kMaxRows &&
                     p->cache_capacity <= kMaxInt && p->num_pages <= kMaxInt && p->page_size <= kMaxInt &&
                     p->batch <= kMaxGrid && p->num_kv_heads <= kMaxGrid;
  const bool aligned = is_aligned(p->q, p->q_stride) && is_aligned(p->k, p->k_stride) &&
                       is_aligned(p->v, p->v_stride) && is_aligned(p->out, p->out_stride) &&
                       is_aligned(p->k_cache, p->k_cache_stride) && is_aligned(p->v_cache, p->v_cache_stride);
  return device->compute_capability == 90 && half && p->k_cache != nullptr && p->cu_seqlens_q.data == nullptr &&
         sizes && aligned && fits_rows(p->k_cache_stride) && fits_rows(p->v_cache_stride);
}

DecodeChoice choose_decode_sm90(const gqa_attention_params *p, const gqa_device *device) {
  DecodeChoice choice{0, 1, true};
  const int row_tiles = query_rows(p) > 8 ? 2 : 1;
  while (kDecodeShapes[choice.shape].dim < p->head_dim || kDecodeShapes[choice.shape].row_tiles != row_tiles) {
    ++choice.shape;
  }
  // As many blocks as fit at once, each with a tile at least for every other warp.
  const DecodeShape &shape = kDecodeShapes[choice.shape];
  const int64_t pairs = p->batch * p->num_kv_heads, slots = static_cast<int64_t>(device->num_sms) * shape.blocks;
  const int64_t tiles = (p->cache_capacity + kTile - 1) / kTile;
  const int64_t useful = std::max<int64_t>(1, 2 * tiles / shape.warps);
  const int64_t parts = std::max<int64_t>(1, std::min(slots / std::max<int64_t>(1, pairs), useful));
  choice.cluster = parts <= kMaxCluster || pairs * kMaxCluster * shape.blocks >= slots;
  choice.parts = static_cast<int32_t>(choice.cluster ? std::min(parts, kMaxCluster) : parts);
  return choice;
}

}  // namespace gqa
