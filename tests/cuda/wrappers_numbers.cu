// The wrappers that turn numbers into others, called by tests/test_wrappers_numbers.py: each over all of its inputs,
// one thread or warp an input, results by plain stores.
#include "cuda/common/pair_max.cuh"
#include "cuda/common/quantized.cuh"
#include "cuda/common/transpose.cuh"
#include "cuda/common/weight_sums.cuh"
#include "cuda/gqa_attention_decode_sm90/quantized_tiles.cuh"

namespace gqa::cuda {

// Of pairs of 16-bit numbers: [0] the larger, [1] the larger or NaN, [2] the smaller, [3] which are not finite.
template <typename T>
__global__ void compare(int count, const uint32_t *a, const uint32_t *b, uint32_t *out) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= count) return;
  out[i] = pair_max<T>(a[i], b[i]);
  out[count + i] = pair_max_nan<T>(a[i], b[i]);
  out[2 * count + i] = pair_min<T>(a[i], b[i]);
  out[3 * count + i] = nonfinite<T>(a[i]);
}

// [0] 2^x, [1] tanh x
__global__ void functions(int count, const float *x, float *out) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= count) return;
  out[i] = exp2_fast(x[i]);
  out[count + i] = tanh_fast(x[i]);
}

// All 256 stored numbers as T: by the kernels that copy caches, and, four at a time, by those that stream weights.
template <typename T>
__global__ void widen_all(int32_t dtype, T *out) {
  const int first = threadIdx.x * kChunk;
  uint8_t stored[kChunk];
  for (int i = 0; i < kChunk; ++i) stored[i] = static_cast<uint8_t>(first + i);
  *reinterpret_cast<uint4 *>(out + first) = widen_stored<T>(dtype, load_stored(stored));
  if (dtype == GQA_DTYPE_INT8) return;
  for (int i = 0; i < kChunk; i += 4) {
    const auto *word = reinterpret_cast<const uint32_t *>(stored + i);
    *reinterpret_cast<uint2 *>(out + 256 + first + i) = widen_e4m3<T>(*word);
  }
}

// Chunks of eight floats to stored numbers, `offset` bytes off alignment, and back from there to floats.
__global__ void store_and_load(int32_t dtype, int chunks, int offset, float scale, const float *x, uint8_t *stored,
                               __half *back) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= chunks) return;
  float chunk[kChunk];
  for (int j = 0; j < kChunk; ++j) chunk[j] = x[i * kChunk + j];
  store_quantized(dtype, stored + offset + i * kChunk, chunk, scale);
  const uint2 loaded = load_stored(stored + offset + i * kChunk);
  *reinterpret_cast<uint4 *>(back + i * kChunk) = widen_stored<__half>(dtype, loaded);
}

// out = in^T, 8 x 8 of 16 bits: a lane has columns 2 (lane % 4) and the next of row lane / 4.
__global__ void transpose(const uint32_t *in, uint32_t *out) { out[threadIdx.x] = transpose_matrix(in[threadIdx.x]); }

// A tile of 16 stored keys, one of values behind it, of 64 dimensions, as a decode block has them in shared memory.
struct Tile {
  static constexpr bool kHolds = true;
  static constexpr int kDim = 64, kChunks = kDim / 16, kRowBytes = 16 * kChunks, kTileBytes = 16 * kRowBytes;
  static constexpr int kSwizzle = 4, kHeads = 1, kTeam = 1;
  static constexpr bool kPaged = false, kPlain = true;
  __host__ __device__ static constexpr int swizzle(int row) { return row >> 1 & 3; }
};

// scores[16 keys][8 rows] = keys q^T; sums[64 dimensions][8 rows] = values^T weights, of weights[8 rows][16 keys].
template <bool kInt8>
__global__ void quantized_products(const uint4 *keys, const uint4 *values, const __half *q, const __half *weights,
                                   float *scores, float *sums) {
  namespace decode = decode_sm90;
  __shared__ __align__(128) unsigned char memory[2 * Tile::kTileBytes];
  decode::Block<Tile> t;
  t.find_lane();
  for (int i = t.lane; i < 16 * Tile::kChunks; i += 32) {
    const int at = decode::lane_offset<Tile>(i / Tile::kChunks, i % Tile::kChunks);
    *reinterpret_cast<uint4 *>(memory + at) = keys[i];
    *reinterpret_cast<uint4 *>(memory + Tile::kTileBytes + at) = values[i];
  }
  __syncwarp();
  decode::Words<Tile> words;
  const auto pair = [](const __half *at) { return *reinterpret_cast<const uint32_t *>(at); };
  float score[4] = {};
  words.keys(t, shared_address(memory), 0);
  words.template each_key<kInt8>([&](int d, const uint32_t(&operand)[4]) {
    const __half *at = q + t.r * Tile::kDim + 16 * d + 4 * t.c;
    multiply_add<__half>(score, operand, pair(at), pair(at + 2));
  });
  for (int i = 0; i < 4; ++i) scores[(t.r + i / 2 * 8) * 8 + 2 * t.c + i % 2] = score[i];
  words.values(t, shared_address(memory), 0);
  words.template each_value<kInt8>([&](int d, const uint32_t(&operand)[4]) {
    const __half *at = weights + t.r * 16 + 2 * t.c;
    float sum[4] = {};
    multiply_add<__half>(sum, operand, pair(at), pair(at + 8));
    for (int i = 0; i < 4; ++i) sums[(16 * d + 2 * t.r + i / 2) * 8 + 2 * t.c + i % 2] = sum[i];
  });
}

template <typename Kernel, typename... Args>
int run(Kernel *kernel, int items, int threads, Args... args) {
  kernel<<<(items + threads - 1) / threads, threads>>>(args...);
  const cudaError_t launched = cudaGetLastError();
  return launched != cudaSuccess ? launched : cudaDeviceSynchronize();
}

}  // namespace gqa::cuda

using namespace gqa::cuda;

extern "C" {

int test_compare(int dtype, int count, const uint32_t *a, const uint32_t *b, uint32_t *out) {
  return dtype == GQA_DTYPE_FLOAT16 ? run(&compare<__half>, count, 128, count, a, b, out)
                                    : run(&compare<__nv_bfloat16>, count, 128, count, a, b, out);
}

int test_functions(int count, const float *x, float *out) { return run(&functions, count, 128, count, x, out); }

int test_widen(int dtype, int stored, void *out) {
  return dtype == GQA_DTYPE_FLOAT16 ? run(&widen_all<__half>, 32, 32, stored, static_cast<__half *>(out))
                                    : run(&widen_all<__nv_bfloat16>, 32, 32, stored, static_cast<__nv_bfloat16 *>(out));
}

int test_store(int stored, int chunks, int offset, float scale, const float *x, uint8_t *to, void *back) {
  return run(&store_and_load, chunks, 128, stored, chunks, offset, scale, x, to, static_cast<__half *>(back));
}

int test_transpose(const uint32_t *in, uint32_t *out) { return run(&transpose, 32, 32, in, out); }

int test_quantized_products(int int8, const void *keys, const void *values, const void *q, const void *weights,
                            float *scores, float *sums) {
  return run(int8 ? &quantized_products<true> : &quantized_products<false>, 32, 32, static_cast<const uint4 *>(keys),
             static_cast<const uint4 *>(values), static_cast<const __half *>(q), static_cast<const __half *>(weights),
             scores, sums);
}

}  // extern "C"
