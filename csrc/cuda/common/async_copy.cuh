// 16-byte copies from global to shared memory that a thread starts and later waits for, in groups.
#pragma once

#include <cstdint>

namespace gqa::cuda {

// Copies 16 bytes around L1, or writes zeros and reads nothing if bytes == 0. L2 fetches 128 bytes at a time: with 256
// the GPU's memory delivers 6 % less.
__device__ __forceinline__ void copy_async16(uint32_t to, const char *from, uint32_t bytes) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

// 16 bytes of a row of any length; zeros, with nothing read, unless `wanted`.
__device__ __forceinline__ void copy_async(uint32_t to, const void *from, bool wanted) {
  copy_async16(to, static_cast<const char *>(from), wanted ? 16 : 0);
}

__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for this thread's groups except the last kLast.
template <int kLast>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLast) : "memory");
}

__device__ __forceinline__ void store_shared16(uint32_t to, uint4 value) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(value.x), "r"(value.y), "r"(value.z),
               "r"(value.w)
               : "memory");
}

}  // namespace gqa::cuda
