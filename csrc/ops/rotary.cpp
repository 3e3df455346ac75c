#include "ops/rotary.h"

namespace gqa::ops {

gqa_index as_index(const char *op, const char *name, const Tensor &index, int64_t batch, int64_t seqlen,
                   const char *like_name, const Tensor &like) {
  check_index_dtype(op, name, index);
  const int64_t rank = index.dim();
  const bool fits = (rank == 1 && index.size(0) == seqlen) ||
                    (rank == 2 && (index.size(0) == batch || index.size(0) == 1) && index.size(1) == seqlen);
  if (!fits) {
    const std::string b = std::to_string(batch), s = std::to_string(seqlen);
    fail(op, std::string(name) + " must have shape [batch, tokens] = [" + b + ", " + s + "], [1, " + s + "] or [" + s +
                 "], got " + shape_string(index));
  }
  check_same_device(op, name, index, like_name, like);
  const int64_t batch_stride = rank == 1 || index.size(0) == 1 ? 0 : index.stride(0);
  return {index.data_ptr(), gqa_dtype_of(index), {batch_stride, index.stride(rank - 1)}};
}

Rotary as_rotary(const char *op, const Tensor &q, int64_t batch, int64_t seqlen, const Tensor &cos, const Tensor &sin,
                 const std::optional<Tensor> &positions, bool interleaved, const RotaryNames &names) {
  check_rank(op, names.cos, cos, {2, 3}, "a table [positions, R/2] or gathered [batch or 1, tokens, R/2]");
  check_weight_dtype(op, names.cos, cos, names.like, q);
  check_same_device(op, names.cos, cos, names.like, q);
  check_same_shape(op, names.sin, sin, names.cos, cos);
  check_same_dtype(op, names.sin, sin, names.cos, cos);
  check_same_device(op, names.sin, sin, names.like, q);

  const int64_t width = cos.size(cos.dim() - 1), head_dim = q.size(q.dim() - 1);
  if (width < 1 || 2 * width > head_dim) {
    fail(op, std::string(names.cos) + " must hold R/2 angles, one per pair, in its last dimension: 1 to " +
                 std::to_string(head_dim / 2) + " for head_dim " + std::to_string(head_dim) + ", got shape " +
                 shape_string(cos));
  }
  const bool gathered = cos.dim() == 3;
  if (gathered) {
    check_shape(op, names.cos, cos, {cos.size(0) == 1 ? 1 : batch, seqlen, width}, "[batch or 1, tokens, R/2]");
    if (positions.has_value()) {
      fail(op, std::string(names.positions) + " must be None where " + names.cos +
                   " is gathered [batch or 1, tokens, R/2], got shape " + shape_string(*positions));
    }
  } else if (names.from_zero && !positions.has_value() && cos.size(0) < seqlen) {
    fail(op, std::string(names.cos) + " must have at least one row for each of the " + std::to_string(seqlen) +
                 " tokens where " + names.positions + " is None, got shape " + shape_string(cos));
  }

  Rotary rotary{cos, sin, {}};
  bool alike = width == 1 || (cos.stride(cos.dim() - 1) == 1 && sin.stride(sin.dim() - 1) == 1);
  for (int64_t i = 0; i + 1 < cos.dim(); ++i) alike = alike && cos.stride(i) == sin.stride(i);
  if (!alike) {
    rotary.cos = torch::stable::contiguous(cos);
    rotary.sin = torch::stable::contiguous(sin);
  }
  gqa_rotary &p = rotary.params;
  p.cos = rotary.cos.data_ptr();
  p.sin = rotary.sin.data_ptr();
  p.dtype = gqa_dtype_of(cos);
  p.dim = static_cast<int32_t>(2 * width);
  p.gathered = gathered;
  p.interleaved = interleaved;
  p.num_positions = gathered ? 0 : cos.size(0);
  p.stride_batch = gathered && cos.size(0) != 1 ? rotary.cos.stride(0) : 0;
  p.stride_row = rotary.cos.stride(cos.dim() - 2);
  if (positions.has_value()) p.positions = as_index(op, names.positions, *positions, batch, seqlen, names.like, q);
  return rotary;
}

}  // namespace gqa::ops
