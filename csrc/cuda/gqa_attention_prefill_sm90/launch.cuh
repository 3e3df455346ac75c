// Launches an instance of prefill_wgmma. Included by one small file each.
#pragma once

#include <algorithm>

#include "cuda/common/launch.cuh"
#include "cuda/gqa_attention_prefill_sm90/dispatch.h"
#include "cuda/gqa_attention_prefill_sm90/prefill_wgmma.cuh"

namespace gqa::cuda::prefill_sm90 {

constexpr int64_t kUnlimited = 1 << 30;  // keys

template <typename T, int kShape>
gqa_status launch_instance(const gqa_attention_params &p, const PrefillPlan &prefill, const gqa_launch &plan,
                           cudaStream_t stream) {
  constexpr PrefillShape kIs = kPrefillShapes[kShape];
  using Tile = PrefillTile<kIs.dim, kIs.keys, kIs.groups>;
  static_assert(Tile::kSharedMemory == kIs.shared_memory() && Tile::kThreads == kIs.threads());
  const bool ragged = p.cu_seqlens_q.data != nullptr, cached = p.k_cache != nullptr;
  const bool paged = p.block_table.data != nullptr, packed = !cached && p.cu_seqlens_k.data != nullptr;
  PrefillArgs a{};
  a.p = p;
  a.k = cached ? p.k_cache : p.k;
  a.v = cached ? p.v_cache : p.v;
  std::copy_n(cached ? p.k_cache_stride : p.k_stride, 3, a.k_stride);
  std::copy_n(cached ? p.v_cache_stride : p.v_stride, 3, a.v_stride);
  a.page_rows = paged ? prefill.page_rows : 0;

  const int64_t outer = paged ? p.num_pages : (packed ? 1 : p.batch);
  const int64_t tokens = paged ? p.page_size : (packed ? p.total_k : (cached ? p.cache_capacity : p.seqlen_k));
  const TokenTensor queries{p.q,        p.dtype,   ragged ? 1 : p.batch, ragged ? p.total_q : p.seqlen_q, p.num_q_heads,
                            p.head_dim, p.q_stride};
  const TokenTensor keys{a.k, p.dtype, outer, tokens, p.num_kv_heads, p.head_dim, a.k_stride};
  const TokenTensor values{a.v, p.dtype, outer, tokens, p.num_kv_heads, p.head_dim, a.v_stride};
  const uint32_t rows = paged ? prefill.page_rows : Tile::kKeys;
  CUtensorMap q, k, v;
  GQA_RETURN_IF_ERROR(encode_panels(queries, {Tile::kRows, Tile::kPanel}, &q));
  // Keys of a page that does not exist are NaN, and so is who attends to them.
  GQA_RETURN_IF_ERROR(encode_panels(keys, {rows, Tile::kPanel, paged}, &k));
  GQA_RETURN_IF_ERROR(encode_panels(values, {rows, Tile::kPanel}, &v));

  const auto limited = [](int64_t window) { return window < 0 || window > kUnlimited ? kUnlimited : window; };
  a.window_left = static_cast<int32_t>(limited(p.window_left));
  a.window_right = static_cast<int32_t>(p.causal ? 0 : limited(p.window_right));
  a.group = p.num_q_heads / p.num_kv_heads;
  a.row_tiles = prefill.row_tiles;
  a.tiles = prefill.tiles;
  a.all_heads = static_cast<int32_t>((p.batch + ragged) * p.num_q_heads);
  a.section = prefill.section;
  a.counts = Tile::kCounts && ragged && p.batch < kPrefillSequences;
  a.plain = !ragged && !cached && !packed && p.k != nullptr && p.cache_leftpad.data == nullptr;
  a.divide();
  a.transforms = p.softcap > 0 || !(p.softmax_scale > 0);
  a.multiplier = a.transforms ? 1.0f : p.softmax_scale * kLog2e;
  a.before_tanh = p.softcap > 0 ? p.softmax_scale / p.softcap : p.softmax_scale * kLog2e;
  a.after_tanh = p.softcap * kLog2e;
  return launch(&prefill_wgmma<T, Tile>, plan, stream, q, k, v, a);
}

}  // namespace gqa::cuda::prefill_sm90

#define GQA_PREFILL_INSTANCE(T, shape, name)                                                          \
  gqa_status gqa::cuda::prefill_sm90::name(const gqa_attention_params &p, const PrefillPlan &prefill, \
                                           const gqa_launch &plan, cudaStream_t stream) {             \
    return launch_instance<T, shape>(p, prefill, plan, stream);                                       \
  }
