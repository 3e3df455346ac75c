// Loads of data that is read once: around L1, asking L2 for the whole row.
#pragma once

#include <cstdint>

namespace gqa::cuda {

// kRow: bytes read of each row; L2 fetches in blocks of 256 bytes where rows are that long.
template <int kRow>
__device__ __forceinline__ uint4 load_stream16(const char *at) {
  uint4 x;
  if constexpr (kRow % 256 == 0) {
    asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "l"(at));
  } else {
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "l"(at));
  }
  return x;
}

template <int kRow>
__device__ __forceinline__ uint2 load_stream8(const char *at) {
  uint2 x;
  if constexpr (kRow % 256 == 0) {
    asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v2.u32 {%0,%1}, [%2];" : "=r"(x.x), "=r"(x.y) : "l"(at));
  } else {
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v2.u32 {%0,%1}, [%2];" : "=r"(x.x), "=r"(x.y) : "l"(at));
  }
  return x;
}

}  // namespace gqa::cuda
