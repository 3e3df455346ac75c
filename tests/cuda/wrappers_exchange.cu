// The wrappers by which threads, blocks and kernels hand over to each other, called by tests/test_wrappers_exchange.py.
// Whoever writes sleeps first, so that a wait which does not wait shows.
#include "cuda/common/async_copy.cuh"
#include "cuda/common/cluster.cuh"
#include "cuda/common/mbarrier.cuh"
#include "cuda/common/programmatic_launch.cuh"
#include "cuda/common/weight_ring.cuh"

namespace gqa::cuda {

constexpr int kBlocks = 8;
const cudaStream_t kStream = cudaStreamPerThread;

// Each block of a cluster sends each other one, itself too, 60 bytes by all forms of push: words 16 s ... of what block
// r has in the end came from block s. names[r]: rank, size and id of the cluster.
__global__ void exchange(uint32_t *received, uint32_t *names) {
  __shared__ __align__(16) uint32_t inbox[kBlocks * 16];
  __shared__ uint64_t barrier;
  const uint32_t rank = cluster_rank(), here = shared_address(&barrier);
  if (threadIdx.x == 0) {
    mbarrier_init(here, 1);
    mbarrier_fence_init();
    mbarrier_arrive_expect(here, kBlocks * 60);
  }
  for (int i = threadIdx.x; i < kBlocks * 16; i += blockDim.x) inbox[i] = 0xdeadbeef;
  __syncthreads();
  cluster_arrive();
  cluster_wait();
  if (rank % 3 == 1) __nanosleep(20000);
  if (threadIdx.x < kBlocks) {
    const uint32_t there = map_to_rank(shared_address(inbox + 16 * rank), threadIdx.x);
    const uint32_t done = map_to_rank(here, threadIdx.x);
    const uint32_t base = 1000 * rank + 100 * threadIdx.x;
    const auto word = [&](int i) { return __uint_as_float(base + i); };
    const auto two = [&](int i) { return static_cast<unsigned long long>(base + i + 1) << 32 | (base + i); };
    push(there, word(0), word(1), word(2), word(3), done);
    push(there + 16, two(4), two(6), done);
    push(there + 32, word(8), word(9), done);
    push(there + 40, two(10), done);
    push(there + 48, base + 12, done);
    push(there + 52, base + 13, done);
    push(there + 56, base + 14, done);
  }
  mbarrier_wait_cluster(here, 0);
  for (int i = threadIdx.x; i < kBlocks * 16; i += blockDim.x) received[blockIdx.x * kBlocks * 16 + i] = inbox[i];
  if (threadIdx.x == 0) {
    names[3 * blockIdx.x] = rank, names[3 * blockIdx.x + 1] = cluster_size(), names[3 * blockIdx.x + 2] = cluster_id();
  }
  cluster_arrive_relaxed();  // a block that ended would take its inbox along
  cluster_wait();
}

// Each block's late write is seen by all others behind the cluster's barrier.
__global__ void cluster_barrier(int rounds, int *board, int *out) {
  const int rank = static_cast<int>(cluster_rank());
  int seen = 0;
  for (int i = 0; i < rounds; ++i) {
    if (i % kBlocks == rank) __nanosleep(5000);
    if (threadIdx.x == 0) board[rank] = i + 1;
    cluster_arrive();
    cluster_wait();
    for (int block = 0; block < kBlocks; ++block) seen += *static_cast<volatile int *>(board + block) == i + 1;
    cluster_arrive();
    cluster_wait();
  }
  out[blockIdx.x * blockDim.x + threadIdx.x] = seen;
}

// Three groups of copies of 16 bytes a thread; waits for the first alone, then for all. Odd threads want nothing: they
// give addresses that nobody may read, and get zeros.
__global__ void copies(const char *from, uint4 *first, uint4 *all, uint4 *stored) {
  __shared__ __align__(16) uint4 memory[4][32];
  const int lane = threadIdx.x;
  const bool wanted = lane % 2 == 0;
  for (int i = 0; i < 4; ++i) memory[i][lane] = make_uint4(~0u, ~0u, ~0u, ~0u);
  const auto at = [&](int i) { return wanted ? from + 16 * (32 * i + lane) : nullptr; };
  copy_async(shared_address(&memory[0][lane]), at(0), wanted);
  copy_async_commit();
  copy_async16(shared_address(&memory[1][lane]), at(1), wanted ? 16 : 0);
  copy_async_commit();
  copy_async(shared_address(&memory[2][lane]), at(2), wanted);
  copy_async_commit();
  copy_async_wait<2>();
  first[lane] = memory[0][lane];
  copy_async_wait<0>();
  for (int i = 0; i < 3; ++i) all[32 * i + lane] = memory[i][lane];
  store_shared16(shared_address(&memory[3][31 - lane]), make_uint4(lane, lane + 100, lane + 200, lane + 300));
  __syncwarp();
  stored[lane] = memory[3][lane];
}

// 32 rows of 128 bytes by copies that leave L2 first, each piece where piece_of says, read back by load_matrices: as
// matrices of 8 rows by 16 bytes. The last row wants `last` bytes of its pieces; zeros follow.
__global__ void ring_stage(const uint4 *from, uint32_t last, uint32_t *out) {
  __shared__ __align__(128) unsigned char stage[32 * kStreamRowBytes];
  uint64_t once;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(once));
  const int lane = threadIdx.x;
  for (int i = lane; i < 32 * kPieces; i += 32) {
    const int row = i / kPieces, piece = i % kPieces;
    copy_piece(piece_of(shared_address(stage), row, piece), from + i, row == 31 ? last : 16, once);
  }
  commit();
  copy_async_wait<0>();
  __syncwarp();
  for (int tile = 0; tile < 4; ++tile) {
    for (int piece = 0; piece < kPieces; piece += 4) {
      uint32_t words[4];  // of pieces piece ... piece + 3 of rows 8 tile ...
      load_matrices(words, piece_of(shared_address(stage), 8 * tile + lane % 8, piece + lane / 8));
      for (int i = 0; i < 4; ++i) out[(8 * tile + lane / 4) * 32 + (piece + i) * 4 + lane % 4] = words[i];
    }
  }
}

// The first kernel lets the second start, waits until it has, and only then writes; the second sees the writes all the
// same. handed[1]: whether they ran side by side.
__global__ void before(volatile int *started, int *handed) {
  launch_dependents();
  if (threadIdx.x != 0) return;
  const long long begin = clock64();
  while (*started == 0 && clock64() - begin < 2'000'000'000) {
  }
  handed[1] = *started;
  __nanosleep(100000);
  handed[0] = 42;
}

__global__ void after(volatile int *started, const int *handed, int *seen) {
  prefetch_l2(handed);
  if (threadIdx.x == 0) *started = 1;
  wait_for_prerequisites();
  if (threadIdx.x == 0) *seen = handed[0];
}

template <typename Kernel, typename... Args>
cudaError_t launch(Kernel *kernel, int blocks, int threads, cudaLaunchAttribute attribute, Args... args) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.stream = kStream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, args...);
}

cudaLaunchAttribute clusters() {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = kBlocks;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  return attribute;
}

int end(cudaError_t launched) { return launched != cudaSuccess ? launched : cudaDeviceSynchronize(); }

}  // namespace gqa::cuda

using namespace gqa::cuda;

extern "C" {

int test_exchange(int clusters_, uint32_t *received, uint32_t *names) {
  return end(launch(&exchange, clusters_ * kBlocks, 32, clusters(), received, names));
}

int test_cluster_barrier(int rounds, int *board, int *out) {
  return end(launch(&cluster_barrier, kBlocks, 64, clusters(), rounds, board, out));
}

int test_copies(const void *from, void *first, void *all, void *stored) {
  copies<<<1, 32, 0, kStream>>>(static_cast<const char *>(from), static_cast<uint4 *>(first), static_cast<uint4 *>(all),
                                static_cast<uint4 *>(stored));
  return end(cudaGetLastError());
}

int test_ring_stage(const void *from, int last, uint32_t *out) {
  ring_stage<<<1, 32, 0, kStream>>>(static_cast<const uint4 *>(from), static_cast<uint32_t>(last), out);
  return end(cudaGetLastError());
}

int test_programmatic(int *started, int *handed, int *seen) {
  // A kernel that is only loaded now would wait for the one before.
  cudaFuncAttributes attributes;
  if (const cudaError_t error = cudaFuncGetAttributes(&attributes, &after)) return error;
  before<<<1, 32, 0, kStream>>>(started, handed);
  return end(launch(&after, 1, 32, programmatic_attribute(), started, static_cast<const int *>(handed), seen));
}

}  // extern "C"
