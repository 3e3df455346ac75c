// CPU twin of qk_rmsnorm_rope: the twins of rmsnorm and of rope in place, a token at a time.
#include "plan/qk_rmsnorm_rope.h"

#include "cpu/types.h"

namespace gqa::cpu {
namespace {

struct HeadsOf {
  const void *x, *weight;
  void *out;
  const int64_t *stride, *out_stride;
  int64_t heads;
};

gqa_status norm_heads(const gqa_qk_rmsnorm_rope_params &p, const HeadsOf &h, int64_t b, int64_t s) {
  const int64_t element = dtype_size(p.dtype);
  gqa_rmsnorm_params norm{};
  norm.struct_size = sizeof(norm);
  norm.dtype = p.dtype;
  norm.weight_dtype = p.weight_dtype;
  norm.x = static_cast<const char *>(h.x) + (b * h.stride[0] + s * h.stride[1]) * element;
  norm.weight = h.weight;
  norm.out = static_cast<char *>(h.out) + (b * h.out_stride[0] + s * h.out_stride[1]) * element;
  norm.rows[0] = 1;
  norm.rows[1] = h.heads;
  norm.hidden = p.head_dim;
  norm.x_stride[1] = h.stride[2];
  norm.out_stride[1] = h.out_stride[2];
  norm.eps = p.eps;
  norm.weight_offset = p.weight_offset;
  norm.cast_before_weight = p.cast_before_weight;
  return h.heads == 0 ? GQA_STATUS_OK : gqa_rmsnorm_cpu(&norm, 0, h.heads);
}

}  // namespace
}  // namespace gqa::cpu

extern "C" gqa_status gqa_qk_rmsnorm_rope_cpu(const gqa_qk_rmsnorm_rope_params *p, int64_t first_row,
                                              int64_t last_row) {
  using namespace gqa;
  GQA_RETURN_IF_ERROR(check_params(p));
  const cpu::HeadsOf q{p->q, p->q_weight, p->q_out, p->q_stride, p->q_out_stride, p->num_q_heads};
  const cpu::HeadsOf k{p->k, p->k_weight, p->k_out, p->k_stride, p->k_out_stride, p->num_kv_heads};
  const gqa_rope_params rope = rope_of(*p);
  for (int64_t row = first_row; row < last_row; ++row) {
    GQA_RETURN_IF_ERROR(cpu::norm_heads(*p, q, row / p->seqlen, row % p->seqlen));
    GQA_RETURN_IF_ERROR(cpu::norm_heads(*p, k, row / p->seqlen, row % p->seqlen));
    GQA_RETURN_IF_ERROR(gqa_rope_cpu(&rope, row, row + 1));
  }
  return GQA_STATUS_OK;
}
