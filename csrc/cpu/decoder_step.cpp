// CPU twin of decoder_step: the twins of the separate ops, one after the other, for each row by itself.
#include "plan/decoder_step.h"

#include <memory>
#include <new>

namespace gqa::cpu {
namespace {

// What one row's ops hand to each other.
struct Row {
  char *residual;    // [hidden]
  char *normed;      // [hidden]
  char *projected;   // [hidden]: outputs of o and of the feed-forward block
  char *qkv;         // [(Hq + 2 Hkv) * D]
  char *attention;   // [Hq * D]
  char *activation;  // [intermediate]
};

struct Step {
  const gqa_decoder_step_params &p;
  int64_t element, q_width, kv_width;
};

gqa_status norm(const Step &s, const void *x, const void *weight, void *out, int64_t rows, int64_t width) {
  gqa_rmsnorm_params n{};
  n.struct_size = sizeof(n);
  n.dtype = n.weight_dtype = s.p.dtype;
  n.x = x;
  n.weight = weight;
  n.out = out;
  n.rows[0] = 1;
  n.rows[1] = rows;
  n.hidden = width;
  n.x_stride[1] = n.out_stride[1] = width;
  n.eps = s.p.eps;
  n.cast_before_weight = 1;
  return gqa_rmsnorm_cpu(&n, 0, rows);
}

gqa_status project(const Step &s, const void *x, int64_t in, const void *weight, int64_t out_features, const void *bias,
                   void *out) {
  gqa_linear_params l{};
  l.struct_size = sizeof(l);
  l.dtype = s.p.dtype;
  l.x = x;
  l.weights[0] = weight;
  l.bias = bias;
  l.out = out;
  l.tokens = 1;
  l.in_features = l.x_stride = l.weight_stride[0] = in;
  l.out_features[0] = l.out_stride = out_features;
  return gqa_linear_cpu(&l, 0, 1);
}

gqa_status add(const Step &s, const Row &r) {
  gqa_residual_add_params a{};
  a.struct_size = sizeof(a);
  a.dtype = s.p.dtype;
  a.x = r.projected;
  a.residual = a.out = r.residual;
  a.rows[0] = a.rows[1] = 1;
  a.hidden = s.p.hidden_size;
  return gqa_residual_add_cpu(&a, 0, gqa_residual_add_rows(&a));
}

gqa_index index_of_row(const gqa_index &index, int64_t b) {
  if (index.data == nullptr) return index;
  const int64_t bytes = index.dtype == GQA_DTYPE_INT64 ? 8 : 4;
  return {static_cast<const char *>(index.data) + b * index.stride[0] * bytes, index.dtype, {0, 0}};
}

// Rotates q and k, appends k and v, attends.
gqa_status attend(const Step &s, const gqa_decoder_layer &layer, int64_t b, const Row &r) {
  const gqa_decoder_step_params &p = s.p;
  const int64_t before = b * p.cache_capacity * s.kv_width * s.element;
  gqa_attention_decode_params a{};
  a.struct_size = sizeof(a);
  a.dtype = p.dtype;
  a.q = r.qkv;
  a.k = r.qkv + s.q_width * s.element;
  a.v = r.qkv + (s.q_width + s.kv_width) * s.element;
  a.k_cache = static_cast<char *>(layer.k_cache) + before;
  a.v_cache = static_cast<char *>(layer.v_cache) + before;
  a.out = r.attention;
  a.cache_seqlens = index_of_row(p.cache_seqlens, b);
  a.cache_leftpad = index_of_row(p.cache_leftpad, b);
  a.batch = a.seqlen_q = a.seqlen_k = 1;
  a.num_q_heads = p.num_q_heads;
  a.num_kv_heads = p.num_kv_heads;
  a.head_dim = p.head_dim;
  a.causal = 1;
  a.window_left = layer.window_left < p.cache_capacity ? static_cast<int32_t>(layer.window_left) : -1;
  a.window_right = -1;
  a.cache_capacity = p.cache_capacity;
  a.q_stride[2] = a.k_stride[2] = a.v_stride[2] = a.out_stride[2] = p.head_dim;
  a.k_cache_stride[1] = a.v_cache_stride[1] = s.kv_width;
  a.k_cache_stride[2] = a.v_cache_stride[2] = p.head_dim;
  a.rotary = p.rotary;
  a.softmax_scale = p.softmax_scale;
  return gqa_attention_decode_cpu(&a, 0, gqa_attention_decode_rows(&a));
}

gqa_status attention_block(const Step &s, const gqa_decoder_layer &layer, int64_t b, const Row &r) {
  const gqa_decoder_step_params &p = s.p;
  char *k = r.qkv + s.q_width * s.element, *v = k + s.kv_width * s.element;
  GQA_RETURN_IF_ERROR(norm(s, r.residual, layer.input_norm, r.normed, 1, p.hidden_size));
  GQA_RETURN_IF_ERROR(project(s, r.normed, p.hidden_size, layer.q_proj, s.q_width, layer.q_bias, r.qkv));
  GQA_RETURN_IF_ERROR(project(s, r.normed, p.hidden_size, layer.k_proj, s.kv_width, layer.k_bias, k));
  GQA_RETURN_IF_ERROR(project(s, r.normed, p.hidden_size, layer.v_proj, s.kv_width, layer.v_bias, v));
  if (layer.q_norm != nullptr) {
    GQA_RETURN_IF_ERROR(norm(s, r.qkv, layer.q_norm, r.qkv, p.num_q_heads, p.head_dim));
    GQA_RETURN_IF_ERROR(norm(s, k, layer.k_norm, k, p.num_kv_heads, p.head_dim));
  }
  GQA_RETURN_IF_ERROR(attend(s, layer, b, r));
  GQA_RETURN_IF_ERROR(project(s, r.attention, s.q_width, layer.o_proj, p.hidden_size, nullptr, r.projected));
  return add(s, r);
}

gqa_status feed_forward_block(const Step &s, const gqa_decoder_layer &layer, const Row &r) {
  const gqa_decoder_step_params &p = s.p;
  GQA_RETURN_IF_ERROR(norm(s, r.residual, layer.mlp_norm, r.normed, 1, p.hidden_size));
  gqa_swiglu_ffn_params f{};
  f.struct_size = sizeof(f);
  f.dtype = p.dtype;
  f.x = r.normed;
  f.w_gate = layer.gate_proj;
  f.w_up = layer.up_proj;
  f.w_down = layer.down_proj;
  f.activation = r.activation;
  f.out = r.projected;
  f.tokens = 1;
  f.hidden = f.out_features = p.hidden_size;
  f.intermediate = p.intermediate;
  f.x_stride = f.w_gate_stride = f.w_up_stride = p.hidden_size;
  f.w_down_stride = p.intermediate;
  GQA_RETURN_IF_ERROR(gqa_swiglu_ffn_cpu(&f, 0, 1));
  return add(s, r);
}

gqa_status decode_row(const Step &s, int64_t b, const Row &r) {
  const gqa_decoder_step_params &p = s.p;
  const int64_t width = p.hidden_size * s.element;
  std::memcpy(r.residual, static_cast<const char *>(p.hidden) + b * width, width);
  for (int i = 0; i < p.num_layers; ++i) {
    GQA_RETURN_IF_ERROR(attention_block(s, p.layers[i], b, r));
    GQA_RETURN_IF_ERROR(feed_forward_block(s, p.layers[i], r));
  }
  GQA_RETURN_IF_ERROR(norm(s, r.residual, p.norm, r.normed, 1, p.hidden_size));
  char *logits = static_cast<char *>(p.logits) + b * p.vocabulary * s.element;
  return project(s, r.normed, p.hidden_size, p.head, p.vocabulary, nullptr, logits);
}

}  // namespace
}  // namespace gqa::cpu

extern "C" gqa_status gqa_decoder_step_cpu(const gqa_decoder_step_params *p, int64_t first_row, int64_t last_row) {
  using namespace gqa;
  GQA_RETURN_IF_ERROR(check_params(p));
  if (first_row >= last_row) return GQA_STATUS_OK;
  const int64_t element = dtype_size(p->dtype);
  const cpu::Step s{*p, element, int64_t{p->num_q_heads} * p->head_dim, int64_t{p->num_kv_heads} * p->head_dim};
  const int64_t widths[] = {p->hidden_size, p->hidden_size, p->hidden_size, s.q_width + 2 * s.kv_width,
                            s.q_width,      p->intermediate};
  int64_t places[6], size = 0;
  for (int i = 0; i < 6; ++i) {
    places[i] = size;
    size += round_up(widths[i] * element, 64);
  }
  const std::unique_ptr<char[]> memory(new (std::nothrow) char[size]);
  if (memory == nullptr) return GQA_STATUS_WORKSPACE_TOO_SMALL;
  char *const base = memory.get();
  const cpu::Row row{base + places[0], base + places[1], base + places[2],
                     base + places[3], base + places[4], base + places[5]};
  for (int64_t b = first_row; b < last_row; ++b) GQA_RETURN_IF_ERROR(cpu::decode_row(s, b, row));
  return GQA_STATUS_OK;
}
