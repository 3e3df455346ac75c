#include "ops/checks.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>

namespace gqa::ops {
namespace {

std::string list_string(const int64_t *begin, size_t count) {
  std::string text = "[";
  for (size_t i = 0; i < count; ++i) text += (i ? ", " : "") + (begin[i] < 0 ? "any" : std::to_string(begin[i]));
  return text + "]";
}

const char *scalar_type_name(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return "float32";
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Double: return "float64";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Short: return "int16";
    case ScalarType::Char: return "int8";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Bool: return "bool";
    case ScalarType::Float8_e4m3fn: return "float8_e4m3fn";
    case ScalarType::Float8_e5m2: return "float8_e5m2";
    default: return "an unsupported dtype";
  }
}

}  // namespace

void fail(const char *op, const std::string &message) { throw std::runtime_error(std::string(op) + ": " + message); }

std::string shape_string(const Tensor &tensor) {
  const auto sizes = tensor.sizes();
  return list_string(sizes.data(), sizes.size());
}

std::string dtype_string(const Tensor &tensor) { return scalar_type_name(tensor.scalar_type()); }

std::string device_string(const Tensor &tensor) {
  if (tensor.is_cpu()) return "cpu";
  return (tensor.is_cuda() ? "cuda:" : "device ") + std::to_string(tensor.get_device_index());
}

int32_t to_gqa_dtype(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return GQA_DTYPE_FLOAT32;
    case ScalarType::Half: return GQA_DTYPE_FLOAT16;
    case ScalarType::BFloat16: return GQA_DTYPE_BFLOAT16;
    case ScalarType::Int: return GQA_DTYPE_INT32;
    case ScalarType::Long: return GQA_DTYPE_INT64;
    case ScalarType::Float8_e4m3fn: return GQA_DTYPE_FLOAT8_E4M3;
    case ScalarType::Char: return GQA_DTYPE_INT8;
    default: return -1;
  }
}

int32_t gqa_dtype_of(const Tensor &tensor) { return to_gqa_dtype(tensor.scalar_type()); }

void check_device(const char *op, const char *name, const Tensor &tensor) {
  if (!tensor.is_cpu() && !tensor.is_cuda()) {
    fail(op, std::string(name) + " must be on cpu or cuda, got " + device_string(tensor));
  }
}

void check_same_device(const char *op, const char *name, const Tensor &tensor, const char *like_name,
                       const Tensor &like) {
  if (tensor.is_cuda() != like.is_cuda() || tensor.is_cpu() != like.is_cpu() ||
      tensor.get_device_index() != like.get_device_index()) {
    fail(op, std::string(name) + " must be on the device of " + like_name + " (" + device_string(like) + "), got " +
                 device_string(tensor));
  }
}

void check_float_dtype(const char *op, const char *name, const Tensor &tensor) {
  const auto type = tensor.scalar_type();
  if (type != ScalarType::Float && type != ScalarType::Half && type != ScalarType::BFloat16) {
    fail(op, std::string(name) + " must be float32, float16 or bfloat16, got " + dtype_string(tensor));
  }
}

void check_same_dtype(const char *op, const char *name, const Tensor &tensor, const char *like_name,
                      const Tensor &like) {
  if (tensor.scalar_type() != like.scalar_type()) {
    fail(op, std::string(name) + " must have the dtype of " + like_name + " (" + dtype_string(like) + "), got " +
                 dtype_string(tensor));
  }
}

void check_weight_dtype(const char *op, const char *name, const Tensor &tensor, const char *like_name,
                        const Tensor &like) {
  if (tensor.scalar_type() != like.scalar_type() && tensor.scalar_type() != ScalarType::Float) {
    fail(op, std::string(name) + " must be float32 or have the dtype of " + like_name + " (" + dtype_string(like) +
                 "), got " + dtype_string(tensor));
  }
}

void check_index_dtype(const char *op, const char *name, const Tensor &tensor) {
  if (tensor.scalar_type() != ScalarType::Int && tensor.scalar_type() != ScalarType::Long) {
    fail(op, std::string(name) + " must be int32 or int64, got " + dtype_string(tensor));
  }
}

void check_rank(const char *op, const char *name, const Tensor &tensor, std::initializer_list<int64_t> ranks,
                const char *layout) {
  if (std::find(ranks.begin(), ranks.end(), tensor.dim()) == ranks.end()) {
    fail(op, std::string(name) + " must be " + layout + ", got shape " + shape_string(tensor));
  }
}

void check_shape(const char *op, const char *name, const Tensor &tensor, Sizes sizes, const char *layout) {
  const auto given = tensor.sizes();
  bool same = given.size() == sizes.size();
  for (size_t i = 0; same && i < sizes.size(); ++i) same = sizes[i] < 0 || given[i] == sizes[i];
  if (!same) {
    fail(op, std::string(name) + " must have shape " + layout + " = " + list_string(sizes.data(), sizes.size()) +
                 ", got " + shape_string(tensor));
  }
}

void check_same_shape(const char *op, const char *name, const Tensor &tensor, const char *like_name,
                      const Tensor &like) {
  const auto a = tensor.sizes(), b = like.sizes();
  if (a.size() != b.size() || !std::equal(a.begin(), a.end(), b.begin())) {
    fail(op, std::string(name) + " must have the shape of " + like_name + " " + shape_string(like) + ", got " +
                 shape_string(tensor));
  }
}

void check_last_stride(const char *op, const char *name, const Tensor &tensor) {
  const int64_t last = tensor.dim() - 1;
  if (last >= 0 && tensor.size(last) > 1 && tensor.stride(last) != 1) {
    fail(op, std::string(name) + " must be contiguous in its last dimension (stride 1), got stride " +
                 std::to_string(tensor.stride(last)));
  }
}

std::vector<int64_t> sizes_of(const Tensor &tensor) { return {tensor.sizes().begin(), tensor.sizes().end()}; }

void check_out(const char *op, const char *name, const Tensor &out, const std::vector<int64_t> &sizes,
               const char *like_name, const Tensor &like) {
  check_same_device(op, name, out, like_name, like);
  check_same_dtype(op, name, out, like_name, like);
  check_shape(op, name, out, sizes, "of the result");
  check_value(op, out.is_contiguous(), name, "contiguous", "strided memory");
}

namespace {

// The bytes that a tensor spans, what lies between its elements included.
std::pair<const char *, const char *> span_of(const Tensor &tensor) {
  int64_t elements = 1;
  for (int64_t i = 0; i < tensor.dim(); ++i) elements += (tensor.size(i) - 1) * tensor.stride(i);
  const auto *first = static_cast<const char *>(tensor.data_ptr());
  return {first, first + elements * static_cast<int64_t>(tensor.element_size())};
}

}  // namespace

void check_apart(const char *op, const char *name, const Tensor &out, const char *other_name, const Tensor &other,
                 bool or_same) {
  if (out.numel() == 0 || other.numel() == 0) return;
  if (or_same && out.data_ptr() == other.data_ptr() && other.is_contiguous() && sizes_of(out) == sizes_of(other)) {
    return;
  }
  const auto [first, last] = span_of(out);
  const auto [other_first, other_last] = span_of(other);
  if (first < other_last && other_first < last) {
    const std::string exception = or_same ? std::string(", or be the contiguous ") + other_name + " itself" : "";
    fail(op, std::string(name) + " must lie apart from " + other_name + " in memory" + exception +
                 ", got tensors that overlap");
  }
}

// Torch's dispatcher looks an op up by its name; its C shim, where the allocator does the work, takes half the time.
Tensor new_tensor(const Tensor &like, Sizes sizes, std::optional<ScalarType> dtype) {
  if (!like.is_cuda()) return torch::stable::new_empty(like, sizes, dtype);
  const ScalarType type = dtype.value_or(like.scalar_type());
  std::array<int64_t, 8> strides;
  if (sizes.size() > strides.size()) return torch::stable::new_empty(like, sizes, type);
  int64_t step = 1;
  for (size_t i = sizes.size(); i-- > 0; step *= std::max<int64_t>(1, sizes[i])) strides[i] = step;
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                                                  torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)),
                                                  aoti_torch_device_type_cuda(), like.get_device_index(), &made));
  return Tensor(made);
}

Tensor new_contiguous(const Tensor &x) { return new_tensor(x, x.sizes()); }

}  // namespace gqa::ops
