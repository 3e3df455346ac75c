// One small kernel a PTX wrapper of csrc/cuda/common, called by tests/test_wrappers_sm90.py: no pipeline, no softmax.
// Everything is one block; operands arrive by TMA, results leave by plain stores in the layout the wrapper promises.
#include "cuda/common/mbarrier.cuh"
#include "cuda/common/mma.cuh"
#include "cuda/common/tma.cuh"
#include "cuda/common/wgmma.cuh"

namespace gqa::cuda {

constexpr int kMaxShared = 200 * 1024;

__device__ unsigned char *aligned_memory() {
  extern __shared__ __align__(1024) unsigned char memory[];
  return memory;
}

// Copies `panels` panels side by side and waits for them.
__device__ void load(uint32_t to, const CUtensorMap &map, uint32_t barrier, uint32_t bytes, int panels, int columns) {
  if (threadIdx.x == 0) {
    mbarrier_init(barrier, 1);
    mbarrier_fence_init();
    mbarrier_arrive_expect(barrier, bytes * panels);
    for (int i = 0; i < panels; ++i) copy_panel(to + i * bytes, map, barrier, i * columns, 0, 0, 0);
  }
  __syncthreads();
  mbarrier_wait(barrier, 0);
}

// The panel at (column, token, head, batch) as it lies in shared memory.
__global__ void dump_panel(const __grid_constant__ CUtensorMap map, int column, int token, int head, int batch,
                           int bytes, unsigned char *out) {
  __shared__ uint64_t barrier;
  unsigned char *memory = aligned_memory();
  if (threadIdx.x == 0) {
    mbarrier_init(shared_address(&barrier), 1);
    mbarrier_fence_init();
    mbarrier_arrive_expect(shared_address(&barrier), bytes);
    copy_panel(shared_address(memory), map, shared_address(&barrier), column, token, head, batch);
  }
  __syncthreads();
  mbarrier_wait(shared_address(&barrier), 0);
  for (int i = threadIdx.x; i < bytes; i += blockDim.x) out[i] = memory[i];
}

// Where the comment of wgmma.cuh says that sum i of this thread belongs.
__device__ int sum_at(int i, int cols) {
  const int lane = threadIdx.x % 32, row = 16 * (threadIdx.x / 32) + lane / 4 + i / 2 % 2 * 8;
  return row * cols + 8 * (i / 4) + 2 * (lane % 4) + i % 2;
}

// out[64][kCols] = a[64][2 panels] b[kCols][2 panels]^T
template <typename T, int kCols, int kSwizzle>
__global__ void score(const __grid_constant__ CUtensorMap a, const __grid_constant__ CUtensorMap b, float *out) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  __shared__ uint64_t barriers[2];
  constexpr uint32_t kA = 64 * kSwizzle, kB = kCols * kSwizzle;
  const uint32_t memory = shared_address(aligned_memory());
  load(memory, a, shared_address(&barriers[0]), kA, 2, kSwizzle / 2);
  load(memory + 2 * kA, b, shared_address(&barriers[1]), kB, 2, kSwizzle / 2);
  const uint32_t left = tile_descriptor(memory, 16), right = tile_descriptor(memory + 2 * kA, 16);
  float sums[kCols / 2];
  pin(sums);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < kSwizzle / 16; ++step) {
    const uint32_t panel = 32 * step / kSwizzle, inside = 32 * step % kSwizzle / 16;
    Wgmma<T, kCols>::template score<kSwizzle>(sums, left + panel * kA / 16 + inside, right + panel * kB / 16 + inside,
                                              step > 0);
  }
  wgmma_commit();
  wgmma_wait<0>();
  pin(sums);
  for (int i = 0; i < kCols / 2; ++i) out[sum_at(i, kCols)] = sums[i];
#endif
}

// out[64][kCols] = 1 + a[64][48] b[48][kCols]; a comes in fragments.
template <typename T, int kCols, int kSwizzle>
__global__ void weigh(const T *a, const __grid_constant__ CUtensorMap b, float *out) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  __shared__ uint64_t barrier;
  constexpr int kRows = 48, kPanels = 2 * kCols / kSwizzle;
  const uint32_t memory = shared_address(aligned_memory());
  load(memory, b, shared_address(&barrier), kRows * kSwizzle, kPanels, kSwizzle / 2);
  const uint32_t right = tile_descriptor(memory, kRows * kSwizzle);
  uint32_t left[kRows / 4];
  for (int i = 0; i < kRows / 4; ++i) {  // two columns each of rows r, r + 8, r (8 columns on), r + 8
    const int lane = threadIdx.x % 32, row = 16 * (threadIdx.x / 32) + lane / 4 + i % 2 * 8;
    const int column = 16 * (i / 4) + i / 2 % 2 * 8 + 2 * (lane % 4);
    left[i] = *reinterpret_cast<const uint32_t *>(a + row * kRows + column);
  }
  float sums[kCols / 2];
  for (int i = 0; i < kCols / 2; ++i) sums[i] = 1;
  pin(sums);
  pin(left);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < kRows / 16; ++step) {
    Wgmma<T, kCols>::template weigh<kSwizzle>(sums, left + 4 * step, right + step * kSwizzle);
  }
  wgmma_commit();
  wgmma_wait<0>();
  pin(sums);
  for (int i = 0; i < kCols / 2; ++i) out[sum_at(i, kCols)] = sums[i];
#endif
}

// One warp hands `count` numbers to another through a ring of two slots; then what phases a barrier shows: out[count]
// says whether parity 1 passed on a fresh one, out[count + 1] whether arrivals and bytes both had to come.
__global__ void hand_over(int count, int *out) {
  __shared__ uint64_t full[2], empty[2], other;
  __shared__ int slots[2];
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; ++i)
      mbarrier_init(shared_address(&full[i]), 1), mbarrier_init(shared_address(&empty[i]), 32);
    mbarrier_init(shared_address(&other), 2);
    mbarrier_fence_init();
  }
  __syncthreads();
  RingPosition<2> at;
  for (int i = 0; i < count; ++i, at.advance()) {
    if (threadIdx.x == 0) {
      mbarrier_wait(shared_address(&empty[at.stage]), at.parity ^ 1);
      if (i % 7 == 0) __nanosleep(2000);
      slots[at.stage] = 3 * i + 1;
      mbarrier_arrive(shared_address(&full[at.stage]));
    } else if (threadIdx.x >= 32) {
      mbarrier_wait(shared_address(&full[at.stage]), at.parity);
      if (i % 5 == 0) __nanosleep(2000);
      if (threadIdx.x == 32 + i % 32) out[i] = slots[at.stage];
      mbarrier_arrive(shared_address(&empty[at.stage]));
    }
  }
  const auto passed = [&](uint32_t parity) {
    uint32_t done;
    asm volatile("{\n.reg .pred p;\nmbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                 : "=r"(done)
                 : "r"(shared_address(&other)), "r"(parity)
                 : "memory");
    return done;
  };
  if (threadIdx.x == 0) {
    out[count] = passed(1) && !passed(0);
    mbarrier_arrive(shared_address(&other));
    const bool early = passed(0);
    mbarrier_arrive_expect(shared_address(&other), 16);
    const bool without_bytes = passed(0);
    asm volatile("mbarrier.complete_tx.relaxed.cta.shared::cta.b64 [%0], 16;" ::"r"(shared_address(&other)) : "memory");
    mbarrier_wait(shared_address(&other), 0);
    out[count + 1] = !early && !without_bytes && !passed(1);
  }
}

// out[16][8] = a[16][16] b[16][8] by multiply_add: a through load_matrices, b, as rows of 8, through the transposed
// one.
template <typename T>
__global__ void multiply(const T *a, const T *b, float *out) {
  __shared__ __align__(16) T left[16][16], right[16][8];
  const int lane = threadIdx.x, row = lane / 4, column = 2 * (lane % 4);
  for (int i = lane; i < 256; i += 32) left[i / 16][i % 16] = a[i];
  for (int i = lane; i < 128; i += 32) right[i / 8][i % 8] = b[i];
  __syncwarp();
  uint32_t x[4], y[4];
  load_matrices(x, shared_address(&left[lane % 16][lane / 16 * 8]));
  load_matrices_transposed(y, shared_address(&right[lane % 16][0]));
  float c[4] = {};
  multiply_add<T>(c, x, y[0], y[1]);
  for (int i = 0; i < 4; ++i) out[(row + i / 2 * 8) * 8 + column + i % 2] = c[i];
}

gqa_status panels(int32_t dtype, const void *data, int64_t tokens, int64_t columns, uint32_t rows, uint32_t width,
                  CUtensorMap *map) {
  const int64_t stride[3] = {tokens * columns, columns, columns};
  return encode_panels({data, dtype, 1, tokens, 1, columns, stride}, {rows, width}, map);
}

template <typename Kernel, typename... Args>
int run(Kernel *kernel, int threads, Args... args) {
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kMaxShared)) return -1;
  kernel<<<1, threads, kMaxShared>>>(args...);
  return cudaDeviceSynchronize();
}

template <typename T, int kCols, int kSwizzle>
int run_score(int32_t dtype, const void *a, const void *b, float *out) {
  CUtensorMap left, right;
  if (panels(dtype, a, 64, kSwizzle, 64, kSwizzle / 2, &left)) return -2;
  if (panels(dtype, b, kCols, kSwizzle, kCols, kSwizzle / 2, &right)) return -2;
  return run(&score<T, kCols, kSwizzle>, 128, left, right, out);
}

template <typename T, int kCols, int kSwizzle>
int run_weigh(int32_t dtype, const void *a, const void *b, float *out) {
  CUtensorMap right;
  if (panels(dtype, b, 48, kCols, 48, kSwizzle / 2, &right)) return -2;
  return run(&weigh<T, kCols, kSwizzle>, 128, static_cast<const T *>(a), right, out);
}

template <typename T>
int run_wgmma(bool scores, int32_t dtype, int cols, int swizzle, const void *a, const void *b, float *out) {
#define GQA_SCORE(n, s) \
  if (scores && cols == n && swizzle == s) return run_score<T, n, s>(dtype, a, b, out)
#define GQA_WEIGH(n, s) \
  if (!scores && cols == n && swizzle == s) return run_weigh<T, n, s>(dtype, a, b, out)
  GQA_SCORE(64, 128);
  GQA_SCORE(80, 128);
  GQA_SCORE(128, 128);
  GQA_SCORE(160, 128);
  GQA_SCORE(96, 64);
  GQA_SCORE(128, 64);
  GQA_WEIGH(64, 128);
  GQA_WEIGH(128, 128);
  GQA_WEIGH(256, 128);
  GQA_WEIGH(96, 64);
#undef GQA_SCORE
#undef GQA_WEIGH
  return -3;
}

}  // namespace gqa::cuda

using namespace gqa::cuda;

extern "C" {

int test_dump_panel(int dtype, const void *data, const int64_t *size, const int64_t *stride, int rows, int columns,
                    int nan, const int *at, unsigned char *out) {
  CUtensorMap map;
  const TokenTensor tensor{data, dtype, size[0], size[1], size[2], size[3], stride};
  if (encode_panels(tensor, {static_cast<uint32_t>(rows), static_cast<uint32_t>(columns), nan != 0}, &map)) return -2;
  return run(&dump_panel, 128, map, at[3], at[1], at[2], at[0], 2 * rows * columns, out);
}

int test_wgmma(int scores, int dtype, int cols, int swizzle, const void *a, const void *b, float *out) {
  return dtype == GQA_DTYPE_FLOAT16 ? run_wgmma<__half>(scores, dtype, cols, swizzle, a, b, out)
                                    : run_wgmma<__nv_bfloat16>(scores, dtype, cols, swizzle, a, b, out);
}

int test_hand_over(int count, int *out) { return run(&hand_over, 64, count, out); }

int test_multiply(int dtype, const void *a, const void *b, float *out) {
  return dtype == GQA_DTYPE_FLOAT16
             ? run(&multiply<__half>, 32, static_cast<const __half *>(a), static_cast<const __half *>(b), out)
             : run(&multiply<__nv_bfloat16>, 32, static_cast<const __nv_bfloat16 *>(a),
                   static_cast<const __nv_bfloat16 *>(b), out);
}

}  // extern "C"
