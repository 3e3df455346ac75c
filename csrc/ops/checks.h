// Refusals, in one form for all ops and devices: "<op>: <argument> <what was wanted>, got <what was given>".
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "gqa_kernels.h"

namespace gqa::ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

[[noreturn]] void fail(const char *op, const std::string &message);

std::string shape_string(const Tensor &tensor);
std::string dtype_string(const Tensor &tensor);
std::string device_string(const Tensor &tensor);

// The C interface's dtype; -1 for one it does not know.
int32_t to_gqa_dtype(ScalarType type);
int32_t gqa_dtype_of(const Tensor &tensor);

// A device the ops run on: CPU or CUDA.
void check_device(const char *op, const char *name, const Tensor &tensor);
void check_same_device(const char *op, const char *name, const Tensor &tensor, const char *like_name,
                       const Tensor &like);
// float32, float16 or bfloat16.
void check_float_dtype(const char *op, const char *name, const Tensor &tensor);
void check_same_dtype(const char *op, const char *name, const Tensor &tensor, const char *like_name,
                      const Tensor &like);
// float32 or the dtype of `like`.
void check_weight_dtype(const char *op, const char *name, const Tensor &tensor, const char *like_name,
                        const Tensor &like);
// int32 or int64.
void check_index_dtype(const char *op, const char *name, const Tensor &tensor);
void check_rank(const char *op, const char *name, const Tensor &tensor, std::initializer_list<int64_t> ranks,
                const char *layout);
// Exact sizes; -1 takes any. `layout` names the dimensions: "[batch, seqlen, heads, head_dim]".
void check_shape(const char *op, const char *name, const Tensor &tensor, Sizes sizes, const char *layout);
void check_same_shape(const char *op, const char *name, const Tensor &tensor, const char *like_name,
                      const Tensor &like);
void check_last_stride(const char *op, const char *name, const Tensor &tensor);
// What a message says: a text, an integer, or what a function gives that is called only where a check fails.
template <typename Text>
std::string text_of(const Text &text) {
  if constexpr (std::is_integral_v<Text>) {
    return std::to_string(text);
  } else if constexpr (std::is_invocable_v<const Text &>) {
    return text();
  } else {
    return text;
  }
}

// `condition` failed to hold: "<name> must be <wanted>, got <given>".
template <typename Wanted, typename Given>
void check_value(const char *op, bool condition, const char *name, const Wanted &wanted, const Given &given) {
  if (!condition) fail(op, std::string(name) + " must be " + text_of(wanted) + ", got " + text_of(given));
}

// Memory for a result: contiguous, with these sizes and the dtype and device of `like`.
void check_out(const char *op, const char *name, const Tensor &out, const std::vector<int64_t> &sizes,
               const char *like_name, const Tensor &like);
// A result and what is read share no memory; or, with `or_same`, are one tensor: each element is read before it is
// written.
void check_apart(const char *op, const char *name, const Tensor &out, const char *other_name, const Tensor &other,
                 bool or_same);

std::vector<int64_t> sizes_of(const Tensor &tensor);

// Contiguous and uninitialised, on the device of `like`, of its dtype if none is named.
Tensor new_tensor(const Tensor &like, Sizes sizes, std::optional<ScalarType> dtype = std::nullopt);
// The same with x's shape and dtype.
Tensor new_contiguous(const Tensor &x);

}  // namespace gqa::ops
