// decoder_step: checks, then params for the CPU twin or the CUDA kernel.
#include <torch/csrc/stable/library.h>

#include <cmath>

#include "ops/attention_params.h"
#include "ops/products.h"
#include "ops/rotary.h"

namespace gqa::ops {
namespace {

constexpr auto kOp = "decoder_step";

using Tensors = std::vector<Tensor>;
using OptionalTensors = std::optional<Tensors>;

// What all of a call's lists have to agree with.
struct Sizes {
  const Tensor &hidden_states;
  int64_t layers, batch, capacity, hidden, q, kv, head_dim, intermediate;
};

std::string sizes_string(const std::vector<int64_t> &sizes) {
  std::string text = "[";
  for (size_t i = 0; i < sizes.size(); ++i) text += (i ? ", " : "") + std::to_string(sizes[i]);
  return text + "]";
}

void check_tensor(const std::string &name, const Tensor &tensor, const std::vector<int64_t> &sizes,
                  const Tensor &like) {
  if (sizes_of(tensor) != sizes) {
    fail(kOp, name + " must have shape " + sizes_string(sizes) + ", got " + shape_string(tensor));
  }
  check_same_dtype(kOp, name.c_str(), tensor, "hidden", like);
  check_same_device(kOp, name.c_str(), tensor, "hidden", like);
  check_value(kOp, tensor.is_contiguous(), name.c_str(), "contiguous", "strided memory");
}

void check_list(const char *name, const Tensors &list, const std::vector<int64_t> &sizes, const Sizes &s) {
  if (static_cast<int64_t>(list.size()) != s.layers) {
    fail(kOp, std::string(name) + " must have one tensor for each of the " + std::to_string(s.layers) +
                  " layers, got " + std::to_string(list.size()));
  }
  for (size_t i = 0; i < list.size(); ++i) {
    check_tensor(std::string(name) + "[" + std::to_string(i) + "]", list[i], sizes, s.hidden_states);
  }
}

void check_together(const char *name, bool has, const char *other_name, bool has_other) {
  if (has == has_other) return;
  fail(kOp, std::string(name) + " must come with " + other_name + ", got " + (has ? "no " : "") +
                (has ? other_name : std::string("only ") + other_name));
}

Sizes check_sizes(const Tensor &hidden, const Tensors &k_caches, const Tensors &q_proj, const Tensors &gate_proj) {
  check_device(kOp, "hidden", hidden);
  check_float_dtype(kOp, "hidden", hidden);
  check_rank(kOp, "hidden", hidden, {2}, "[batch, hidden]");
  check_value(kOp, hidden.size(1) >= 1, "hidden", "[batch, hidden] with hidden at least 1",
              "shape " + shape_string(hidden));
  if (k_caches.empty()) fail(kOp, "k_caches must have a tensor for each layer, got none");
  check_rank(kOp, "k_caches[0]", k_caches[0], {4}, "[batch, capacity, kv_heads, head_dim]");
  if (q_proj.empty() || gate_proj.empty())
    fail(kOp, "q_proj and gate_proj must have a tensor for each layer, got none");
  check_rank(kOp, "q_proj[0]", q_proj[0], {2}, "[q_heads * head_dim, hidden]");
  check_rank(kOp, "gate_proj[0]", gate_proj[0], {2}, "[intermediate, hidden]");
  const Tensor &cache = k_caches[0];
  check_value(kOp, cache.size(1) >= 1 && cache.size(2) >= 1, "k_caches[0]",
              "[batch, capacity, kv_heads, head_dim] with a row and a head at least", "shape " + shape_string(cache));
  check_head_dim(kOp, "k_caches[0]", cache);
  Sizes s{hidden,
          static_cast<int64_t>(k_caches.size()),
          hidden.size(0),
          cache.size(1),
          hidden.size(1),
          q_proj[0].size(0),
          cache.size(2) * cache.size(3),
          cache.size(3),
          gate_proj[0].size(0)};
  if (s.q == 0 || s.q % s.kv != 0) {
    fail(kOp, "q_proj[0] must have a multiple of the cache's " + std::to_string(s.kv) +
                  " = kv_heads * head_dim rows, got " + shape_string(q_proj[0]));
  }
  return s;
}

void check_numbers(double eps, std::optional<double> softmax_scale, const std::optional<std::vector<int64_t>> &windows,
                   int64_t layers) {
  check_value(kOp, eps >= 0, "eps", "0 or more", std::to_string(eps));
  if (softmax_scale) {
    check_value(kOp, std::isfinite(*softmax_scale), "softmax_scale", "finite", std::to_string(*softmax_scale));
  }
  if (!windows) return;
  if (static_cast<int64_t>(windows->size()) != layers) {
    fail(kOp, "window_left must have one value for each of the " + std::to_string(layers) + " layers, got " +
                  std::to_string(windows->size()));
  }
  for (const int64_t window : *windows) {
    check_value(kOp, window >= -1, "window_left", "-1 (all) or more for each layer", std::to_string(window));
  }
}

Tensor decoder_step(const Tensor &given, const Tensors &k_caches, const Tensors &v_caches, const Tensors &q_proj,
                    const Tensors &k_proj, const Tensors &v_proj, const Tensors &o_proj, const Tensors &gate_proj,
                    const Tensors &up_proj, const Tensors &down_proj, const Tensors &input_norm,
                    const Tensors &mlp_norm, const Tensor &norm, const Tensor &head, const Tensor &cache_seqlens,
                    double eps, const OptionalTensor &cache_leftpad, const OptionalTensor &rotary_cos,
                    const OptionalTensor &rotary_sin, const OptionalTensors &q_bias, const OptionalTensors &k_bias,
                    const OptionalTensors &v_bias, const OptionalTensors &q_norm, const OptionalTensors &k_norm,
                    std::optional<double> softmax_scale, const std::optional<std::vector<int64_t>> &window_left) {
  const Sizes s = check_sizes(given, k_caches, q_proj, gate_proj);
  const Tensor hidden = torch::stable::contiguous(given);
  const std::vector<int64_t> cache{s.batch, s.capacity, s.kv / s.head_dim, s.head_dim};
  check_list("k_caches", k_caches, cache, s);
  check_list("v_caches", v_caches, cache, s);
  check_list("q_proj", q_proj, {s.q, s.hidden}, s);
  check_list("k_proj", k_proj, {s.kv, s.hidden}, s);
  check_list("v_proj", v_proj, {s.kv, s.hidden}, s);
  check_list("o_proj", o_proj, {s.hidden, s.q}, s);
  check_list("gate_proj", gate_proj, {s.intermediate, s.hidden}, s);
  check_list("up_proj", up_proj, {s.intermediate, s.hidden}, s);
  check_list("down_proj", down_proj, {s.hidden, s.intermediate}, s);
  check_list("input_norm", input_norm, {s.hidden}, s);
  check_list("mlp_norm", mlp_norm, {s.hidden}, s);
  check_tensor("norm", norm, {s.hidden}, hidden);
  check_rank(kOp, "head", head, {2}, "[vocabulary, hidden]");
  check_tensor("head", head, {head.size(0), s.hidden}, hidden);
  check_together("q_bias", q_bias.has_value(), "k_bias", k_bias.has_value());
  check_together("q_bias", q_bias.has_value(), "v_bias", v_bias.has_value());
  check_together("q_norm", q_norm.has_value(), "k_norm", k_norm.has_value());
  check_together("rotary_cos", rotary_cos.has_value(), "rotary_sin", rotary_sin.has_value());
  if (q_bias.has_value()) {
    check_list("q_bias", *q_bias, {s.q}, s);
    check_list("k_bias", *k_bias, {s.kv}, s);
    check_list("v_bias", *v_bias, {s.kv}, s);
  }
  if (q_norm.has_value()) {
    check_list("q_norm", *q_norm, {s.head_dim}, s);
    check_list("k_norm", *k_norm, {s.head_dim}, s);
  }
  check_numbers(eps, softmax_scale, window_left, s.layers);
  const auto lengths = [&](const char *name, const Tensor &index) {
    check_index_dtype(kOp, name, index);
    check_shape(kOp, name, index, {s.batch}, "[batch]");
    check_same_device(kOp, name, index, "hidden", hidden);
    return gqa_index{index.data_ptr(), gqa_dtype_of(index), {index.stride(0), 0}};
  };

  gqa_decoder_step_params p{};
  p.struct_size = sizeof(p);
  p.dtype = gqa_dtype_of(hidden);
  p.num_layers = static_cast<int32_t>(s.layers);
  p.cache_seqlens = lengths("cache_seqlens", cache_seqlens);
  if (cache_leftpad.has_value()) p.cache_leftpad = lengths("cache_leftpad", *cache_leftpad);
  std::optional<Rotary> rotary;
  if (rotary_cos.has_value()) {
    check_rank(kOp, "rotary_cos", *rotary_cos, {2}, "a table [positions, R/2]");
    const RotaryNames names{"rotary_cos", "rotary_sin", "rotary_positions", "hidden", false};
    rotary = as_rotary(kOp, k_caches[0], s.batch, 1, *rotary_cos, *rotary_sin, std::nullopt, false, names);
    p.rotary = rotary->params;
  }
  std::vector<gqa_decoder_layer> layers(k_caches.size());
  for (size_t i = 0; i < layers.size(); ++i) {
    gqa_decoder_layer &l = layers[i];
    l.q_proj = q_proj[i].data_ptr(), l.k_proj = k_proj[i].data_ptr(), l.v_proj = v_proj[i].data_ptr();
    l.o_proj = o_proj[i].data_ptr(), l.gate_proj = gate_proj[i].data_ptr(), l.up_proj = up_proj[i].data_ptr();
    l.down_proj = down_proj[i].data_ptr();
    l.input_norm = input_norm[i].data_ptr(), l.mlp_norm = mlp_norm[i].data_ptr();
    if (q_bias.has_value()) {
      l.q_bias = (*q_bias)[i].data_ptr(), l.k_bias = (*k_bias)[i].data_ptr(), l.v_bias = (*v_bias)[i].data_ptr();
    }
    if (q_norm.has_value()) l.q_norm = (*q_norm)[i].data_ptr(), l.k_norm = (*k_norm)[i].data_ptr();
    l.k_cache = k_caches[i].data_ptr(), l.v_cache = v_caches[i].data_ptr();
    l.window_left = window_left.has_value() ? (*window_left)[i] : -1;
  }
  const std::vector<int64_t> sizes{s.batch, head.size(0)};
  const Tensor logits = new_tensor(hidden, sizes);
  if (logits.numel() == 0) return logits;
  p.layers = layers.data();
  p.hidden = hidden.data_ptr(), p.norm = norm.data_ptr(), p.head = head.data_ptr(), p.logits = logits.data_ptr();
  p.batch = s.batch, p.hidden_size = s.hidden, p.intermediate = s.intermediate, p.vocabulary = head.size(0);
  p.cache_capacity = s.capacity;
  p.num_q_heads = static_cast<int32_t>(s.q / s.head_dim), p.num_kv_heads = static_cast<int32_t>(s.kv / s.head_dim);
  p.head_dim = static_cast<int32_t>(s.head_dim);
  p.eps = static_cast<float>(eps);
  p.softmax_scale = static_cast<float>(softmax_scale.value_or(1.0 / std::sqrt(static_cast<double>(s.head_dim))));

  constexpr auto kEntry = GQA_ENTRY(kOp, decoder_step, gqa_decoder_step_params);
  std::optional<Tensor> workspace;
  if (on_cuda(hidden)) {
    gqa_plan plan{};
    if (const char *reason = refusal(kEntry, p, hidden, &plan); reason != nullptr) {
      fail(kOp, std::string("its CUDA kernel does not serve this call: ") + reason);
    }
    if (!explaining()) {
      workspace = new_tensor(hidden, std::vector<int64_t>{plan.workspace_size}, ScalarType::Byte);
      p.workspace = workspace->data_ptr();
      p.workspace_size = plan.workspace_size;
    }
  }
  run(kEntry, p, hidden, s.hidden * head.size(0));
  return logits;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gqa_kernels, CPU, m) { m.impl(kOp, TORCH_BOX(&decoder_step)); }

STABLE_TORCH_LIBRARY_IMPL(gqa_kernels, CUDA, m) { m.impl(kOp, TORCH_BOX(&decoder_step)); }

}  // namespace gqa::ops
