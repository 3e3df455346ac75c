// rope and rope_: checks, then params for the CPU twin or the CUDA kernel.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "ops/heads.h"
#include "ops/rotary.h"
#include "ops/run.h"

namespace gqa::ops {
namespace {

void rotate(const char *op, const Heads &q, const Heads &q_out, const Heads *k, const Heads *k_out,
            const gqa_rotary &rotary) {
  gqa_rope_params p{};
  p.struct_size = sizeof(p);
  p.dtype = gqa_dtype_of(q.tensor);
  p.q = q.tensor.data_ptr();
  p.q_out = q_out.tensor.data_ptr();
  p.batch = q.size[0];
  p.seqlen = q.size[1];
  p.num_q_heads = static_cast<int32_t>(q.size[2]);
  p.head_dim = static_cast<int32_t>(q.size[3]);
  std::copy_n(q.stride, 3, p.q_stride);
  std::copy_n(q_out.stride, 3, p.q_out_stride);
  if (k != nullptr && k->tensor.numel() != 0) {
    p.k = k->tensor.data_ptr();
    p.k_out = k_out->tensor.data_ptr();
    p.num_kv_heads = static_cast<int32_t>(k->size[2]);
    std::copy_n(k->stride, 3, p.k_stride);
    std::copy_n(k_out->stride, 3, p.k_out_stride);
  }
  p.rotary = rotary;
  const int64_t heads = p.num_q_heads + p.num_kv_heads;
  if (p.batch * p.seqlen * heads != 0) run(GQA_ENTRY(op, rope, gqa_rope_params), p, q.tensor, heads * p.head_dim);
}

constexpr auto kRope = "rope";

void rotate_into(const Tensor &q, const std::optional<Tensor> &k, const Tensor &cos, const Tensor &sin,
                 const std::optional<Tensor> &position_ids, bool interleaved, const Tensor &q_result,
                 const Tensor &k_result) {
  const Heads q_in = with_unit_stride(q), q_out = as_heads(q_result);
  const Rotary rotary = as_rotary(kRope, q, q_in.size[0], q_in.size[1], cos, sin, position_ids, interleaved);
  if (!k.has_value()) return rotate(kRope, q_in, q_out, nullptr, nullptr, rotary.params);
  const Heads k_in = with_unit_stride(*k), k_out = as_heads(k_result);
  rotate(kRope, q_in, q_out, &k_in, &k_out, rotary.params);
}

std::tuple<Tensor, Tensor> rope(const Tensor &q, const std::optional<Tensor> &k, const Tensor &cos, const Tensor &sin,
                                const std::optional<Tensor> &position_ids, bool interleaved) {
  check_heads(kRope, q, k);
  const int64_t none = 0;
  const Tensor q_out = new_contiguous(q), k_out = k ? new_contiguous(*k) : new_tensor(q, {&none, 1});
  rotate_into(q, k, cos, sin, position_ids, interleaved, q_out, k_out);
  return {q_out, k_out};
}

void rope_out(const Tensor &q, const std::optional<Tensor> &k, const Tensor &cos, const Tensor &sin,
              const std::optional<Tensor> &position_ids, bool interleaved, const Tensor &q_out,
              const std::optional<Tensor> &k_out) {
  check_heads(kRope, q, k);
  if (k.has_value() != k_out.has_value()) {
    fail(kRope, std::string("out must be one tensor for each of q and k, got ") + (k ? "none for k" : "two without k"));
  }
  const auto check = [&](const char *name, const Tensor &out, const char *like_name, const Tensor &like) {
    check_out(kRope, name, out, sizes_of(like), like_name, like);
    check_apart(kRope, name, out, "q", q, &like == &q);
    if (k.has_value()) check_apart(kRope, name, out, "k", *k, &like != &q);
    check_apart(kRope, name, out, "cos", cos, false);
    check_apart(kRope, name, out, "sin", sin, false);
  };
  check("q_out", q_out, "q", q);
  if (k.has_value()) {
    check("k_out", *k_out, "k", *k);
    check_apart(kRope, "k_out", *k_out, "q_out", q_out, false);
  }
  rotate_into(q, k, cos, sin, position_ids, interleaved, q_out, k_out.value_or(q_out));
}

// Dimensions of more than one element, the widest stride first.
std::vector<int> by_stride(const Heads &heads) {
  std::vector<int> order;
  for (int i = 0; i < 4; ++i) {
    if (heads.size[i] > 1) order.push_back(i);
  }
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return heads.stride[a] > heads.stride[b]; });
  return order;
}

// Elements from the first to one past the last, over the dimensions from order[from] on.
int64_t extent(const Heads &heads, const std::vector<int> &order, size_t from) {
  int64_t last = 0;
  for (size_t i = from; i < order.size(); ++i) last += (heads.size[order[i]] - 1) * heads.stride[order[i]];
  return last + 1;
}

void check_in_place(const char *op, const char *name, const Heads &heads) {
  check_last_stride(op, name, heads.tensor);
  const auto order = by_stride(heads);
  for (size_t i = 0; i < order.size(); ++i) {
    if (heads.stride[order[i]] >= extent(heads, order, i + 1)) continue;
    const auto strides = heads.tensor.strides();
    std::string text;
    for (size_t j = 0; j < strides.size(); ++j) text += (j ? ", " : "") + std::to_string(strides[j]);
    fail(op, std::string(name) +
                 " must have no two elements in one place of memory, to be written in place; got shape " +
                 shape_string(heads.tensor) + " with strides [" + text + "]");
  }
}

// Whether k lies apart from q, also where the two are interleaved, as slices of one projection are: within each step
// of a common outer stride they lie side by side. `distance` is in bytes, of k from q, over the dimensions from
// `level`.
bool disjoint(const Heads &q, const Heads &k, const std::vector<int> &q_order, const std::vector<int> &k_order,
              int64_t distance, size_t level) {
  const int64_t element = static_cast<int64_t>(q.tensor.element_size());
  if (distance >= extent(q, q_order, level) * element || -distance >= extent(k, k_order, level) * element) return true;
  if (level >= q_order.size() || level >= k_order.size()) return false;
  const int64_t step = q.stride[q_order[level]] * element;
  if (step != k.stride[k_order[level]] * element) return false;
  const int64_t q_extent = extent(q, q_order, level + 1) * element, k_extent = extent(k, k_order, level + 1) * element;
  const int64_t after = (distance % step + step) % step;
  for (const int64_t next : {after, after - step}) {
    // One step of both fits in the common stride, so a step of k can only meet the same step of q.
    const int64_t both = std::max(q_extent, next + k_extent) - std::min<int64_t>(0, next);
    if (both <= step && disjoint(q, k, q_order, k_order, next, level + 1)) return true;
  }
  return false;
}

bool disjoint(const Heads &q, const Heads &k) {
  if (q.tensor.numel() == 0 || k.tensor.numel() == 0) return true;
  const auto *q_data = static_cast<char *>(q.tensor.data_ptr()), *k_data = static_cast<char *>(k.tensor.data_ptr());
  return disjoint(q, k, by_stride(q), by_stride(k), k_data - q_data, 0);
}

void rope_(const Tensor &q, const std::optional<Tensor> &k, const Tensor &cos, const Tensor &sin,
           const std::optional<Tensor> &position_ids, bool interleaved) {
  constexpr auto kOp = "rope_";
  check_heads(kOp, q, k);
  const Heads q_heads = as_heads(q);
  check_in_place(kOp, "q", q_heads);
  const Rotary rotary = as_rotary(kOp, q, q_heads.size[0], q_heads.size[1], cos, sin, position_ids, interleaved);
  if (!k.has_value()) return rotate(kOp, q_heads, q_heads, nullptr, nullptr, rotary.params);
  const Heads k_heads = as_heads(*k);
  check_in_place(kOp, "k", k_heads);
  if (!disjoint(q_heads, k_heads)) fail(kOp, "k must lie apart from q in memory, to be written in place; they overlap");
  rotate(kOp, q_heads, q_heads, &k_heads, &k_heads, rotary.params);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gqa_kernels, CPU, m) {
  m.impl(kRope, TORCH_BOX(&rope));
  m.impl("rope.out", TORCH_BOX(&rope_out));
  m.impl("rope_", TORCH_BOX(&rope_));
}

STABLE_TORCH_LIBRARY_IMPL(gqa_kernels, CUDA, m) {
  m.impl(kRope, TORCH_BOX(&rope));
  m.impl("rope.out", TORCH_BOX(&rope_out));
  m.impl("rope_", TORCH_BOX(&rope_));
}

}  // namespace gqa::ops
