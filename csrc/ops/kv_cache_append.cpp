// kv_cache_append: checks, then params for the CPU twin or the CUDA kernel.
#include <torch/csrc/stable/library.h>

#include "ops/attention_params.h"
#include "ops/run.h"

namespace gqa::ops {
namespace {

constexpr auto kOp = "kv_cache_append";

void kv_cache_append(Tensor k, Tensor v, Tensor k_cache, Tensor v_cache, Tensor cache_seqlens,
                     OptionalTensor cache_leftpad, OptionalTensor block_table, OptionalTensor rotary_cos,
                     OptionalTensor rotary_sin, OptionalTensor rotary_positions, bool rotary_interleaved,
                     OptionalTensor k_scale, OptionalTensor v_scale) {
  const CacheArguments cache{k_cache, v_cache, cache_seqlens, cache_leftpad, block_table, k_scale, v_scale};
  const RotaryArguments rotary{rotary_cos, rotary_sin, rotary_positions, rotary_interleaved};
  check_device(kOp, "k", k);
  check_float_dtype(kOp, "k", k);
  check_rank(kOp, "k", k, {4}, "[batch, seqlen, num_kv_heads, head_dim]");
  check_head_dim(kOp, "k", k);
  check_same_shape(kOp, "v", v, "k", k);
  check_same_dtype(kOp, "v", v, "k", k);
  check_same_device(kOp, "v", v, "k", k);
  check_cache(kOp, cache, k.size(0), "k", k, true);
  check_cache_heads(kOp, k, cache);
  check_new_length(kOp, k.size(1), cache);
  Kept kept;
  gqa_kv_cache_append_params p{};
  p.rotary = to_rotary(kOp, rotary, k.size(0), k.size(1), "k", k, &kept);
  if (k.numel() == 0) return;

  const Tensor k_rows = with_unit_stride(k, &kept), v_rows = with_unit_stride(v, &kept);
  p.struct_size = sizeof(p);
  p.dtype = gqa_dtype_of(k);
  p.k = k_rows.data_ptr();
  p.v = v_rows.data_ptr();
  p.batch = k.size(0);
  p.seqlen = k.size(1);
  p.num_kv_heads = static_cast<int32_t>(k.size(2));
  p.head_dim = static_cast<int32_t>(k.size(3));
  p.cache_leftpad = to_index(cache_leftpad);
  fill_cache(cache, &p);
  fill_strides(k_rows, &p.k_stride);
  fill_strides(v_rows, &p.v_stride);
  run(GQA_ENTRY(kOp, kv_cache_append, gqa_kv_cache_append_params), p, k, p.seqlen * p.head_dim);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gqa_kernels, CPU, m) { m.impl(kOp, TORCH_BOX(&kv_cache_append)); }

STABLE_TORCH_LIBRARY_IMPL(gqa_kernels, CUDA, m) { m.impl(kOp, TORCH_BOX(&kv_cache_append)); }

}  // namespace gqa::ops
