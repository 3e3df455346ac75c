// Caches of float8_e4m3fn and int8, and their scales.
#include "ops/attention_params.h"

namespace gqa::ops {
namespace {

bool is_quantized(const Tensor &cache) {
  return cache.scalar_type() == ScalarType::Float8_e4m3fn || cache.scalar_type() == ScalarType::Char;
}

bool has_quantized(const CacheArguments &cache) { return cache.k_cache && is_quantized(*cache.k_cache); }

// One number, or one for each KV head.
void check_scale(const char *op, const char *name, const OptionalTensor &scale, const char *cache_name,
                 const CacheArguments &cache, const char *like_name, const Tensor &like) {
  if (!scale) return;
  if (!has_quantized(cache)) {
    fail(op, std::string(name) + " must be None unless " + cache_name + " is float8_e4m3fn or int8, got a value");
  }
  const int64_t heads = cache.k_cache->size(2);
  check_value(op, scale->scalar_type() == ScalarType::Float, name, "float32", dtype_string(*scale));
  const bool fits = scale->dim() == 0 || (scale->dim() == 1 && (scale->size(0) == 1 || scale->size(0) == heads));
  check_value(op, fits, name, "one element, or [num_kv_heads] = [" + std::to_string(heads) + "]",
              "shape " + shape_string(*scale));
  check_same_device(op, name, *scale, like_name, like);
}

}  // namespace

void check_cache_dtype(const char *op, const char *name, const Tensor &cache, const char *like_name,
                       const Tensor &like) {
  if (!is_quantized(cache)) return check_same_dtype(op, name, cache, like_name, like);
  check_value(op, like.scalar_type() != ScalarType::Float, like_name,
              std::string("float16 or bfloat16 where ") + name + " is " + dtype_string(cache), dtype_string(like));
}

void check_scales(const char *op, const CacheArguments &cache, const char *like_name, const Tensor &like) {
  check_scale(op, "k_scale", cache.k_scale, "k_cache", cache, like_name, like);
  check_scale(op, "v_scale", cache.v_scale, "v_cache", cache, like_name, like);
}

gqa_kv_quantization to_quantization(const CacheArguments &cache) {
  if (!has_quantized(cache)) return {};
  const auto data = [](const OptionalTensor &scale) {
    return scale ? static_cast<const float *>(pointer_to(*scale)) : nullptr;
  };
  const auto stride = [](const OptionalTensor &scale) -> int64_t {
    return scale && scale->numel() > 1 ? scale->stride(0) : 0;
  };
  return {gqa_dtype_of(*cache.k_cache), data(cache.k_scale), data(cache.v_scale), stride(cache.k_scale),
          stride(cache.v_scale)};
}

}  // namespace gqa::ops
