#include "plan/decoder_step.h"

namespace gqa {
namespace {

constexpr int64_t kLargest = int64_t{1} << 30;

bool are_aligned(const gqa_decoder_layer &l) {
  for (const void *x : {l.q_proj, l.k_proj, l.v_proj, l.o_proj, l.gate_proj, l.up_proj, l.down_proj, l.input_norm,
                        l.mlp_norm, static_cast<const void *>(l.k_cache), static_cast<const void *>(l.v_cache)}) {
    if (!is_aligned(x)) return false;
  }
  return true;
}

// Why the kernel doesn't serve valid params, or nullptr.
const char *refusal(const gqa_decoder_step_params &p, const gqa_device &device) {
  if (device.compute_capability != 90 || !has_sm90_code()) return "not sm_90";
  if (p.dtype == GQA_DTYPE_FLOAT32) return "float32";
  if (p.batch > kStepRows) return "more than 8 rows";
  if (p.num_layers > kStepLayers) return "more than 100 layers";
  if (p.head_dim != 64 && p.head_dim != 96 && p.head_dim != 128) return "head_dim is not 64, 96 or 128";
  if (p.num_q_heads > kStepGroup * p.num_kv_heads) return "more than 8 query heads a KV head";
  if (p.hidden_size % 16 != 0 || p.intermediate % 16 != 0) return "sizes are no multiples of 16";
  if (p.hidden_size > kStepHidden) return "hidden states wider than 8192";
  const int64_t q = static_cast<int64_t>(p.num_q_heads) * p.head_dim,
                kv = static_cast<int64_t>(p.num_kv_heads) * p.head_dim;
  if (p.hidden_size > kStepOwned * (device.num_sms - 1) || q + 2 * kv > kStepBiases * (device.num_sms - 1)) {
    return "too few multiprocessors for its size";
  }
  if (std::max(p.intermediate, p.vocabulary) > kLargest || p.cache_capacity > kLargest) return "sizes beyond 2^30";
  bool aligned = is_aligned(p.hidden) && is_aligned(p.norm) && is_aligned(p.head);
  for (int i = 0; i < p.num_layers; ++i) aligned = aligned && are_aligned(p.layers[i]);
  if (!aligned) return "tensors are not 16-byte aligned";
  const DecoderStepPlan step = plan_decoder_step(p, device);
  if (step.ring_bytes < 3 * step.stage_bytes) return "too many rows for the size of an SM's shared memory";
  return nullptr;
}

bool is_complete(const gqa_decoder_layer &l) {
  const bool biases = !l.q_bias == !l.k_bias && !l.q_bias == !l.v_bias, norms = !l.q_norm == !l.k_norm;
  return l.q_proj && l.k_proj && l.v_proj && l.o_proj && l.gate_proj && l.up_proj && l.down_proj && l.input_norm &&
         l.mlp_norm && l.k_cache && l.v_cache && biases && norms;
}

}  // namespace

gqa_status check_params(const gqa_decoder_step_params *p) {
  GQA_RETURN_IF_ERROR(check_struct(p));
  if (!is_float_dtype(p->dtype)) return GQA_STATUS_UNSUPPORTED;
  if (!is_index(p->cache_seqlens) || !is_index(p->cache_leftpad)) return GQA_STATUS_UNSUPPORTED;
  const bool sizes = p->batch >= 0 && p->num_layers >= 1 && p->hidden_size >= 1 && p->intermediate >= 1 &&
                     p->vocabulary >= 1 && p->cache_capacity >= 1 && p->num_kv_heads >= 1 && p->head_dim >= 1 &&
                     p->num_q_heads >= p->num_kv_heads && p->num_q_heads % p->num_kv_heads == 0;
  const gqa_rotary &r = p->rotary;
  const bool rotary = r.cos == nullptr || (r.sin != nullptr && !r.gathered && r.positions.data == nullptr &&
                                           r.dim >= 2 && r.dim % 2 == 0 && r.dim <= p->head_dim);
  if (!sizes || !rotary) return GQA_STATUS_INVALID_ARGUMENT;
  if (p->head_dim % 8 != 0 || p->head_dim > 256) return GQA_STATUS_UNSUPPORTED;
  if (r.cos != nullptr && r.dtype != p->dtype && r.dtype != GQA_DTYPE_FLOAT32) return GQA_STATUS_UNSUPPORTED;
  if (p->batch == 0) return GQA_STATUS_OK;
  bool complete = p->hidden && p->norm && p->head && p->logits && p->layers && p->cache_seqlens.data;
  for (int i = 0; complete && i < p->num_layers; ++i) complete = is_complete(p->layers[i]);
  return complete ? GQA_STATUS_OK : GQA_STATUS_NULL_POINTER;
}

}  // namespace gqa

extern "C" {

int64_t gqa_decoder_step_rows(const gqa_decoder_step_params *p) { return p->batch; }

gqa_status gqa_decoder_step_plan(const gqa_decoder_step_params *p, const gqa_device *device, gqa_plan *plan) {
  using namespace gqa;
  GQA_RETURN_IF_ERROR(check_params(p));
  *plan = {};
  if (p->batch == 0) return GQA_STATUS_OK;
  plan->reason = refusal(*p, *device);
  if (plan->reason != nullptr) return GQA_STATUS_UNSUPPORTED;
  plan->reason = "few rows: one kernel stays for the whole step";
  const DecoderStepPlan step = plan_decoder_step(*p, *device);
  plan->workspace_size = step.workspace_size;
  const Dim3 grid{device->num_sms}, block{kStepThreads};
  add_launch(plan, make_launch("decoder_step", "decoder_step", p->dtype, grid, block, step.shared_memory));
  return GQA_STATUS_OK;
}

}  // extern "C"
