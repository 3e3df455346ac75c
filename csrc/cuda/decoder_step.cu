// decoder_step: one token of each row through a whole decoder in one cooperative launch.
// The kernel and its mapping: decoder_step_sm90/kernel.cuh. Before it the workspace is filled with ones, so that
// nothing a launch leaves behind is read by the next.
// Memory order: as of that kernel, every weight once.
// Limits: sm_90; as many blocks as SMs, all at once: the launch fails where they have no room.
// Determinism: as of that kernel, bitwise repeatable.
#include "cuda/common/launch.cuh"
#include "cuda/decoder_step_sm90/kernel.cuh"

namespace gqa::cuda {
namespace {

using decoder_step::Args;

decoder_step::Layer layer_of(const gqa_decoder_layer &l) {
  const auto in = [](const void *x) { return static_cast<const char *>(x); };
  return {in(l.q_proj),
          in(l.k_proj),
          in(l.v_proj),
          in(l.o_proj),
          in(l.gate_proj),
          in(l.up_proj),
          in(l.down_proj),
          in(l.input_norm),
          in(l.mlp_norm),
          in(l.q_bias),
          in(l.k_bias),
          in(l.v_bias),
          in(l.q_norm),
          in(l.k_norm),
          static_cast<char *>(l.k_cache),
          static_cast<char *>(l.v_cache),
          l.window_left};
}

Args args_of(const gqa_decoder_step_params &p, const DecoderStepPlan &plan) {
  Args a{};
  a.rows = static_cast<int32_t>(p.batch), a.layers = p.num_layers;
  a.hidden = static_cast<int32_t>(p.hidden_size), a.intermediate = static_cast<int32_t>(p.intermediate);
  a.q_heads = p.num_q_heads, a.kv_heads = p.num_kv_heads;
  a.ahead = kStepAhead, a.group = p.num_q_heads / p.num_kv_heads, a.head_dim = p.head_dim,
  a.vocabulary = static_cast<int32_t>(p.vocabulary), a.capacity = static_cast<int32_t>(p.cache_capacity);
  a.ring_bytes = static_cast<int32_t>(plan.ring_bytes), a.stage_bytes = static_cast<int32_t>(plan.stage_bytes);
  a.inputs_at = static_cast<int32_t>(plan.inputs_at), a.ring_at = static_cast<int32_t>(plan.ring_at);
  a.splits = static_cast<int32_t>(plan.splits), a.min_keys = kStepPart;
  a.eps = p.eps, a.scale = p.softmax_scale * decoder_step::kLog2e;
  a.input = static_cast<const char *>(p.hidden);
  char *workspace = static_cast<char *>(p.workspace);
  const auto words = [&](int64_t at) { return reinterpret_cast<uint16_t *>(workspace + at); };
  a.after_attention = words(plan.after_attention), a.after_layer = words(plan.after_layer);
  a.qkv = words(plan.qkv), a.attention = words(plan.attention), a.activated = words(plan.activated);
  a.of_layer = plan.of_layer / 2;
  a.parts = reinterpret_cast<uint64_t *>(workspace + plan.parts);
  a.norm = static_cast<const char *>(p.norm), a.head = static_cast<const char *>(p.head);
  a.logits = static_cast<char *>(p.logits);
  a.cache_seqlens = p.cache_seqlens, a.cache_leftpad = p.cache_leftpad, a.rotary = p.rotary;
  for (int i = 0; i < p.num_layers; ++i) a.layer[i] = layer_of(p.layers[i]);
  return a;
}

template <typename T>
void (*kernel_of(int dim))(Args) {
  return dim == 64   ? decoder_step::decoder_step<T, 64>
         : dim == 96 ? decoder_step::decoder_step<T, 96>
                     : decoder_step::decoder_step<T, 128>;
}

gqa_status run(const gqa_plan &plan, const gqa_decoder_step_params &p, const gqa_device &device, cudaStream_t stream) {
  if (p.workspace == nullptr || p.workspace_size < plan.workspace_size) return GQA_STATUS_WORKSPACE_TOO_SMALL;
  const DecoderStepPlan step = plan_decoder_step(p, device);
  const Args args = args_of(p, step);
  void (*kernel)(Args) =
      p.dtype == GQA_DTYPE_BFLOAT16 ? kernel_of<__nv_bfloat16>(p.head_dim) : kernel_of<__half>(p.head_dim);
  const gqa_launch &launch = plan.launches[0];
  GQA_RETURN_IF_ERROR(allow_shared_memory(reinterpret_cast<const void *>(kernel), launch.shared_memory));
  GQA_RETURN_IF_ERROR(check_cuda(cudaMemsetAsync(p.workspace, 0xff, step.workspace_size, stream)));
  log_launch(launch);
  cudaLaunchAttribute together{};
  together.id = cudaLaunchAttributeCooperative;
  together.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(launch.grid[0]);
  config.blockDim = dim3(launch.block[0]);
  config.dynamicSmemBytes = launch.shared_memory;
  config.stream = stream;
  config.attrs = &together;
  config.numAttrs = 1;
  return check_cuda(cudaLaunchKernelEx(&config, kernel, args));
}

}  // namespace
}  // namespace gqa::cuda

extern "C" gqa_status gqa_decoder_step_cuda(const gqa_decoder_step_params *p, CUstream_st *stream) {
  using namespace gqa::cuda;
  GQA_RETURN_IF_ERROR(gqa::check_params(p));
  gqa_device device;
  GQA_RETURN_IF_ERROR(current_device(&device));
  gqa_plan plan;
  GQA_RETURN_IF_ERROR(gqa_decoder_step_plan(p, &device, &plan));
  return plan.num_launches == 0 ? GQA_STATUS_OK : run(plan, *p, device, stream);
}
