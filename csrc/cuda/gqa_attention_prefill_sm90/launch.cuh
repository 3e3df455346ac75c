// Launches an instance of prefill_wgmma. Included by one small file each.
#pragma once

#include <algorithm>

#include "cuda/common/launch.cuh"
#include "cuda/gqa_attention_prefill_sm90/dispatch.h"
#include "cuda/gqa_attention_prefill_sm90/prefill_wgmma.cuh"

namespace gqa::cuda::prefill_sm90 {

template <typename T, int kShape>
gqa_status launch_instance(const gqa_attention_params &p, const PrefillPlan &prefill, const gqa_launch &plan,
                           cudaStream_t stream) {
  constexpr PrefillShape kIs = kPrefillShapes[kShape];
  using Tile = PrefillTile<kIs.dim, kIs.keys, kIs.groups>;
  static_assert(Tile::kSharedMemory == kIs.shared_memory() && Tile::kThreads == kIs.threads());
  const TokenTensor queries{p.q, p.dtype, p.batch, p.seqlen_q, p.num_q_heads, kIs.dim, p.q_stride};
  const TokenTensor keys{p.k, p.dtype, p.batch, p.seqlen_k, p.num_kv_heads, kIs.dim, p.k_stride};
  const TokenTensor values{p.v, p.dtype, p.batch, p.seqlen_k, p.num_kv_heads, kIs.dim, p.v_stride};
  CUtensorMap q, k, v;
  GQA_RETURN_IF_ERROR(encode_tiles(queries, Tile::kRows, &q));
  GQA_RETURN_IF_ERROR(encode_tiles(keys, Tile::kKeys, &k));
  GQA_RETURN_IF_ERROR(encode_tiles(values, Tile::kKeys, &v));
  constexpr float kLog2e = 1.4426950408889634f;
  PrefillArgs a{};
  a.out = p.out;
  a.lse = p.lse;
  std::copy_n(p.out_stride, 3, a.out_stride);
  a.queries = static_cast<int32_t>(p.seqlen_q);
  a.keys = static_cast<int32_t>(p.seqlen_k);
  a.heads = p.num_q_heads;
  a.group = p.num_q_heads / p.num_kv_heads;
  a.row_tiles = prefill.row_tiles;
  a.tiles = prefill.tiles;
  a.all_heads = static_cast<int32_t>(p.batch * p.num_q_heads);
  a.section = prefill.section;
  a.multiplier = p.softmax_scale * kLog2e;
  return launch(&prefill_wgmma<T, Tile>, plan, stream, q, k, v, a);
}

}  // namespace gqa::cuda::prefill_sm90

#define GQA_PREFILL_INSTANCE(T, shape, name)                                                          \
  gqa_status gqa::cuda::prefill_sm90::name(const gqa_attention_params &p, const PrefillPlan &prefill, \
                                           const gqa_launch &plan, cudaStream_t stream) {             \
    return launch_instance<T, shape>(p, prefill, plan, stream);                                       \
  }
