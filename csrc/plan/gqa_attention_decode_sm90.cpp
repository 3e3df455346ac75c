#include "plan/gqa_attention_decode_sm90.h"

#include <algorithm>
#include <atomic>

#include "common/status.h"
#include "plan/plan.h"
#include "plan/tensors.h"

namespace gqa {
namespace {

constexpr int64_t kMaxRows = 16;     // query tokens times heads of the group
constexpr int64_t kMaxGrid = 65535;  // in y and z
constexpr int64_t kMaxInt = 0x7fffffff - 64;
constexpr int32_t kMinSms = 100;     // a cluster has to fit one of the device's groups of SMs
constexpr int64_t kLong = 4096;      // keys of head_dim 128 from which on a sequence wants several blocks
constexpr int64_t kManyLong = 2048;  // the same with many sequences
constexpr int64_t kUnlike = 16384;   // keys from which on sequences of a batch may be of very unlike length
constexpr int64_t kLongest = 16384;  // keys of a single sequence beyond which the largest rings count most
constexpr int64_t kBrief = 8192;     // keys below which a call is over so soon that overlapping launches count
constexpr int64_t kShare = 1024;     // keys of a block, from which on further blocks share them
constexpr int64_t kMostBlocks = 16, kMostGrown = 8;
constexpr int32_t kManyTiles = 4;  // of a warp, before more blocks join in
constexpr float kFair = 1.1f;      // of an SM's part of all keys: equal sequences just fit
constexpr int64_t kEarlyPart = 8;  // first tiles are loaded ahead of the length if they are at most such a part of all
constexpr int64_t kTurnSms = 132, kTurnsOf16 = 18, kTurnsOf8 = 30, kTurnsAlone = 15;  // clusters that so many SMs hold
constexpr int64_t kInvariantBlocks = 8;

std::atomic<int32_t> kernel_override{0};
enum Override { kAutomatic, kPortable };

int64_t query_rows(const gqa_attention_params *p) { return p->seqlen_q * (p->num_q_heads / p->num_kv_heads); }
int64_t pairs(const gqa_attention_params *p) { return p->batch * p->num_kv_heads; }
int64_t head_groups(const gqa_attention_params *p, const DecodeShape &shape) {
  return ceil_div<int64_t>(p->num_kv_heads, shape.heads);
}

bool has_aligned_tokens(const gqa_attention_params *p) {
  const int64_t queries[3] = {p->batch, p->seqlen_q, p->num_q_heads};
  const int64_t keys[3] = {p->batch, p->seqlen_q, p->num_kv_heads};
  return is_aligned(p->q, p->q_stride, queries) && is_aligned(p->out, p->out_stride, queries) &&
         is_aligned(p->k, p->k_stride, keys) && is_aligned(p->v, p->v_stride, keys);
}

bool has_aligned_cache(const gqa_attention_params *p) {
  const bool paged = p->block_table.data != nullptr;
  const int64_t size[3] = {paged ? p->num_pages : p->batch, paged ? p->page_size : p->cache_capacity, p->num_kv_heads};
  const int64_t element = p->quantization.dtype != 0 ? 1 : 2;
  return is_aligned(p->k_cache, p->k_cache_stride, size, element) &&
         is_aligned(p->v_cache, p->v_cache_stride, size, element);
}

bool fits_rows(const int64_t *stride) { return stride[1] >= 0 && stride[1] <= kMaxInt / 2; }

bool are_many(int64_t items, const gqa_device *device) { return items > 2 * device->num_sms; }

// As many sequences and KV heads as SMs, or nearly so, none of them long.
bool is_one_wave(const gqa_attention_params *p, const gqa_device *device, int64_t items, int64_t keys) {
  return 2 * items > device->num_sms && items <= device->num_sms && keys * p->head_dim < kLong * 128;
}

// Whether sequences may be so unlike that blocks are given to them by their lengths, if the shape can.
bool are_unlike(const gqa_attention_params *p, const gqa_device *device, int64_t keys) {
  const int64_t narrow = p->head_dim <= 64 ? 2 : 1, unlike = (p->quantization.dtype != 0 ? 2 : 1) * kUnlike / narrow;
  return p->batch > 1 && keys >= unlike && !p->batch_invariant && p->batch * p->cache_capacity < kMaxInt &&
         !are_many(pairs(p), device);
}

int find_shape(const gqa_attention_params *p, const gqa_device *device, int64_t keys) {
  const int row_tiles = query_rows(p) > 8 ? 2 : 1;
  const int bytes = p->quantization.dtype != 0 ? 1 : 2;
  const auto serves = [&](const DecodeShape &shape) {
    return shape.bytes == bytes && shape.dim == p->head_dim && shape.row_tiles == row_tiles;
  };
  int shape = 0;
  while (shape < kDecodeShapeCount && !serves(kDecodeShapes[shape])) ++shape;
  if (p->head_dim != 128 || row_tiles != 1) return shape;
  const int large = shape, small = bytes == 1 ? shape + 1 : shape + 2;
  if (p->batch_invariant || are_unlike(p, device, keys)) return small;
  const int64_t sms = device->num_sms, items = pairs(p);
  if (bytes == 1) {
    if (16 * items <= sms) return keys > 2 * kLongest ? large : small;
    return 4 * items > sms && items <= sms ? large : small;
  }
  if (8 * items <= sms) return keys > kLongest ? large : shape + 1;
  // One large block an SM where that makes one wave, or many short ones; else three small ones.
  return is_one_wave(p, device, items, keys) || (are_many(items, device) && keys < kManyLong) ? large : small;
}

// Blocks for a sequence and a block's KV heads: the most that find room at once. Of many sequences some are short, so
// that of a large cache each gets more, of which a short one lets go.
int64_t find_cluster(const gqa_attention_params *p, const gqa_device *device, const DecodeShape &shape, int64_t items,
                     int64_t keys) {
  if (p->batch_invariant) return kInvariantBlocks;  // whatever the batch and the capacity
  const int64_t sms = device->num_sms;
  const bool many = are_many(items, device), quantised = shape.bytes == 1, alone = shape.resident == 1;
  // Blocks to aim for: half an SM's worth of large ones, or two an SM of three small ones.
  int64_t wanted = shape.resident < 3 ? 5 * sms / 8 : 15 * sms / 8;
  if (quantised && !alone) wanted = shape.resident == 2 ? 5 * sms / 4 : 2 * sms;
  bool whole = items >= 8 * sms;  // of several sequences some are short: halves even it out
  if (quantised) {
    whole = whole || (alone && 2 * items > sms) || (shape.dim == 64 && many);
  } else {
    whole = whole || (alone && many) || (shape.resident < 3 && is_one_wave(p, device, items, keys));
    if (whole && items < 8 * sms) return 1;
  }
  int64_t cluster = whole ? 1 : 2;
  while (2 * cluster <= (quantised && alone ? 8 : kMostBlocks) && 2 * cluster * items <= wanted) cluster *= 2;
  if (many && shape.turns > 0) {
    int64_t grown = cluster;
    while (2 * grown <= kMostGrown && 2 * grown * (quantised ? kShare : kShare / 2) <= keys) grown *= 2;
    if (grown > (quantised ? 4 : 2)) cluster = grown;
  }
  const int64_t useful = std::max<int64_t>(1, ceil_div<int64_t>(keys, shape.tile) * shape.heads / shape.warps);
  while (cluster > useful) cluster /= 2;
  return cluster;
}

}  // namespace

bool is_portable_asked_for() { return kernel_override.load(std::memory_order_relaxed) == kPortable; }

const char *refuse_decode_sm90(const gqa_attention_params *p, const gqa_device *device) {
  if (is_portable_asked_for()) return "the portable kernels were asked for";
  if (device->compute_capability != 90) return "clusters of blocks need compute capability 9.0";
  if (device->num_sms < kMinSms || !has_sm90_code()) return "clusters of blocks need a whole GPU and code for sm_90";
  if (p->dtype == GQA_DTYPE_FLOAT32) return "float32 runs on the CUDA cores, one warp per row";
  if (p->num_splits > 0) return "the number of splits was given";
  if (query_rows(p) > kMaxRows) return "clusters of blocks take at most 16 query rows per KV head";
  if (find_shape(p, device, 0) >= kDecodeShapeCount) {
    return "clusters of blocks take head_dim 64 and 128, and 96 and 256 with at most 8 query rows per KV head";
  }
  const bool room = p->cache_capacity > 0 && (p->block_table.data == nullptr || p->num_pages > 0);
  if (!room) return "there is no cache to read";
  if (p->batch > kMaxGrid || p->num_kv_heads > kMaxGrid || p->cache_capacity > kMaxInt || p->num_pages > kMaxInt ||
      p->page_size > kMaxInt || !fits_rows(p->k_cache_stride) || !fits_rows(p->v_cache_stride)) {
    return "clusters of blocks take sizes below 2^16 sequences and 2^31 keys";
  }
  if (!has_aligned_tokens(p)) return "clusters of blocks take rows that start at multiples of 16 bytes";
  return nullptr;
}

DecodePlan plan_decode_sm90(const gqa_attention_params *p, const gqa_device *device, int64_t keys) {
  DecodePlan plan{};
  plan.shape = find_shape(p, device, keys);
  const DecodeShape &shape = kDecodeShapes[plan.shape];
  const int64_t groups = head_groups(p, shape), items = p->batch * groups, team = shape.warps / shape.heads;
  int64_t cluster = find_cluster(p, device, shape, items, keys);
  plan.share = static_cast<int32_t>((p->batch_invariant || are_many(items, device) ? kManyTiles : 1) * team);
  if (shape.turns > 0 && are_unlike(p, device, keys)) {
    cluster = shape.turns;
    const int64_t room = shape.turns == 16 ? kTurnsOf16 : (shape.resident == 1 ? kTurnsAlone : kTurnsOf8);
    plan.turns = static_cast<int32_t>(room * device->num_sms / kTurnSms);
    plan.fair = kFair * static_cast<float>(groups) / static_cast<float>(device->num_sms);
  }
  plan.heads = shape.heads;
  plan.cluster = static_cast<int32_t>(cluster);
  plan.grid[0] = plan.cluster;
  plan.grid[1] = plan.turns > 0 ? plan.turns : static_cast<int32_t>(groups);
  plan.grid[2] = plan.turns > 0 ? 1 : static_cast<int32_t>(p->batch);
  plan.balanced = p->batch > 1 && shape.resident > 1 && cluster > 1;
  const bool many = are_many(items, device), sparse = shape.resident > 1 && 2 * cluster * items <= device->num_sms;
  plan.programmatic = sparse || (!many && plan.turns == 0 && (cluster <= 2 || keys < kBrief));
  plan.triggers_early = plan.programmatic && !sparse;
  if (!has_aligned_cache(p)) {
    plan.cache = DecodeCache::kAny;
  } else if (p->block_table.data != nullptr) {
    plan.cache = DecodeCache::kPaged;
  }
  plan.plain = plan.cache != DecodeCache::kAny && p->seqlen_q == 1 && p->k == nullptr && p->rotary.cos == nullptr &&
               p->cache_leftpad.data == nullptr && (p->window_left < 0 || p->window_left >= p->cache_capacity) &&
               p->softcap == 0;
  plan.early =
      plan.plain && plan.turns == 0 && (p->batch == 1 || (!many && cluster * team * shape.tile * kEarlyPart <= keys));
  const int64_t slots = ceil_div<int64_t>(query_rows(p) * shape.heads * (shape.dim / 32), cluster);
  plan.shared_memory = decode_fixed_memory(shape) + slots * cluster * kDecodeUnitBytes;
  return plan;
}

}  // namespace gqa

extern "C" void gqa_set_kernel_override(int32_t family) {
  gqa::kernel_override.store(family, std::memory_order_relaxed);
}
