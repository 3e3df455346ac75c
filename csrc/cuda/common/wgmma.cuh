// Warpgroup tensor-core products (sm_90a): 64 rows by kCols columns by 16, float32 sums in registers.
// Of the sums a thread holds, for each 8 columns, what multiply_add of mma.cuh says; warp w has rows 16 w and up.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace gqa::cuda {

// Sums and operands in registers belong to the products from fence to wait; the empty asm keeps their order.
template <typename T, int kSize>
__device__ __forceinline__ void pin(T (&x)[kSize]) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    if constexpr (std::is_same_v<T, float>) {
      asm volatile("" : "+f"(x[i])::"memory");
    } else {
      asm volatile("" : "+r"(x[i])::"memory");
    }
  }
}

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits for all committed groups but the last kLast.
template <int kLast>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLast) : "memory");
}

template <int kRegisters>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Low word of a descriptor of a tile in panels whose rows are one swizzle long, 1024-byte aligned; moving on by n bytes
// adds n / 16. `panel` is the distance of panels in bytes: where the product runs over rows and the columns are its
// columns, a descriptor spans panels.
__device__ __forceinline__ uint32_t tile_descriptor(uint32_t address, uint32_t panel) {
  return (address >> 4) | (panel >> 4) << 16;
}

// High word: kSwizzle, 64 or 128 bytes, is a row of a panel; groups of 8 rows follow each other.
template <int kSwizzle>
__device__ __forceinline__ uint64_t full_descriptor(uint32_t low) {
  constexpr uint32_t kHigh = 8 * kSwizzle >> 4 | (kSwizzle == 128 ? 1u : 2u) << 30;
  uint64_t descriptor;
  asm("mov.b64 %0, {%1, %2};" : "=l"(descriptor) : "r"(low), "r"(kHigh));
  return descriptor;
}

// Wgmma<T, kCols>::score: sums (+)= a b^T, both in shared memory with the product running along rows of the tile.
// Wgmma<T, kCols>::weigh: sums += a b with a, 16 columns of it, in registers and b's rows 16 rows of the tile.
template <typename T, int kCols>
struct Wgmma;

#define GQA_SUMS0 "%0, %1, %2, %3, %4, %5, %6, %7"
#define GQA_SUMS1 "%8, %9, %10, %11, %12, %13, %14, %15"
#define GQA_SUMS2 "%16, %17, %18, %19, %20, %21, %22, %23"
#define GQA_SUMS3 "%24, %25, %26, %27, %28, %29, %30, %31"
#define GQA_SUMS4 "%32, %33, %34, %35, %36, %37, %38, %39"
#define GQA_SUMS5 "%40, %41, %42, %43, %44, %45, %46, %47"
#define GQA_SUMS6 "%48, %49, %50, %51, %52, %53, %54, %55"
#define GQA_SUMS7 "%56, %57, %58, %59, %60, %61, %62, %63"
#define GQA_SUMS8 "%64, %65, %66, %67, %68, %69, %70, %71"
#define GQA_SUMS9 "%72, %73, %74, %75, %76, %77, %78, %79"
#define GQA_SUMS10 "%80, %81, %82, %83, %84, %85, %86, %87"
#define GQA_SUMS11 "%88, %89, %90, %91, %92, %93, %94, %95"
#define GQA_SUMS12 "%96, %97, %98, %99, %100, %101, %102, %103"
#define GQA_SUMS13 "%104, %105, %106, %107, %108, %109, %110, %111"
#define GQA_SUMS14 "%112, %113, %114, %115, %116, %117, %118, %119"
#define GQA_SUMS15 "%120, %121, %122, %123, %124, %125, %126, %127"
#define GQA_PLUS8(d, i)                                                                                       \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])

#define GQA_WGMMA(T, type, cols, sums, plus, o0, o1, o2, o3, o4, o5)                                              \
  template <>                                                                                                     \
  struct Wgmma<T, cols> {                                                                                         \
    template <int kSwizzle>                                                                                       \
    static __device__ __forceinline__ void score(float (&d)[cols / 2], uint32_t a, uint32_t b, int add) {         \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " o2                                                         \
                   ", 0;\n"                                                                                       \
                   "wgmma.mma_async.sync.aligned.m64n" #cols "k16.f32." type "." type " {" sums "}, " o0 ", " o1  \
                   ", p, 1, 1, 0, 0;\n}"                                                                          \
                   : plus                                                                                         \
                   : "l"(full_descriptor<kSwizzle>(a)), "l"(full_descriptor<kSwizzle>(b)), "r"(add));             \
    }                                                                                                             \
    template <int kSwizzle>                                                                                       \
    static __device__ __forceinline__ void weigh(float (&d)[cols / 2], const uint32_t *a, uint32_t b) {           \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " o5                                                         \
                   ", 0;\n"                                                                                       \
                   "wgmma.mma_async.sync.aligned.m64n" #cols "k16.f32." type "." type " {" sums "}, {" o0 ", " o1 \
                   ", " o2 ", " o3 "}, " o4 ", p, 1, 1, 1;\n}"                                                    \
                   : plus                                                                                         \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(full_descriptor<kSwizzle>(b)), "r"(1));      \
    }                                                                                                             \
  }
#define GQA_LIST(...) __VA_ARGS__
#define GQA_WGMMA_TYPES(cols, sums, plus, ...)                       \
  GQA_WGMMA(__half, "f16", cols, sums, GQA_LIST(plus), __VA_ARGS__); \
  GQA_WGMMA(__nv_bfloat16, "bf16", cols, sums, GQA_LIST(plus), __VA_ARGS__)

GQA_WGMMA_TYPES(64, GQA_SUMS0 ", " GQA_SUMS1 ", " GQA_SUMS2 ", " GQA_SUMS3,
                GQA_LIST(GQA_PLUS8(d, 0), GQA_PLUS8(d, 8), GQA_PLUS8(d, 16), GQA_PLUS8(d, 24)), "%32", "%33", "%34",
                "%35", "%36", "%37");
GQA_WGMMA_TYPES(80, GQA_SUMS0 ", " GQA_SUMS1 ", " GQA_SUMS2 ", " GQA_SUMS3 ", " GQA_SUMS4,
                GQA_LIST(GQA_PLUS8(d, 0), GQA_PLUS8(d, 8), GQA_PLUS8(d, 16), GQA_PLUS8(d, 24), GQA_PLUS8(d, 32)), "%40",
                "%41", "%42", "%43", "%44", "%45");
GQA_WGMMA_TYPES(96, GQA_SUMS0 ", " GQA_SUMS1 ", " GQA_SUMS2 ", " GQA_SUMS3 ", " GQA_SUMS4 ", " GQA_SUMS5,
                GQA_LIST(GQA_PLUS8(d, 0), GQA_PLUS8(d, 8), GQA_PLUS8(d, 16), GQA_PLUS8(d, 24), GQA_PLUS8(d, 32),
                         GQA_PLUS8(d, 40)),
                "%48", "%49", "%50", "%51", "%52", "%53");
GQA_WGMMA_TYPES(128,
                GQA_SUMS0 ", " GQA_SUMS1 ", " GQA_SUMS2 ", " GQA_SUMS3 ", " GQA_SUMS4 ", " GQA_SUMS5 ", " GQA_SUMS6
                          ", " GQA_SUMS7,
                GQA_LIST(GQA_PLUS8(d, 0), GQA_PLUS8(d, 8), GQA_PLUS8(d, 16), GQA_PLUS8(d, 24), GQA_PLUS8(d, 32),
                         GQA_PLUS8(d, 40), GQA_PLUS8(d, 48), GQA_PLUS8(d, 56)),
                "%64", "%65", "%66", "%67", "%68", "%69");
GQA_WGMMA_TYPES(160,
                GQA_SUMS0 ", " GQA_SUMS1 ", " GQA_SUMS2 ", " GQA_SUMS3 ", " GQA_SUMS4 ", " GQA_SUMS5 ", " GQA_SUMS6
                          ", " GQA_SUMS7 ", " GQA_SUMS8 ", " GQA_SUMS9,
                GQA_LIST(GQA_PLUS8(d, 0), GQA_PLUS8(d, 8), GQA_PLUS8(d, 16), GQA_PLUS8(d, 24), GQA_PLUS8(d, 32),
                         GQA_PLUS8(d, 40), GQA_PLUS8(d, 48), GQA_PLUS8(d, 56), GQA_PLUS8(d, 64), GQA_PLUS8(d, 72)),
                "%80", "%81", "%82", "%83", "%84", "%85");
GQA_WGMMA_TYPES(256,
                GQA_SUMS0 ", " GQA_SUMS1 ", " GQA_SUMS2 ", " GQA_SUMS3 ", " GQA_SUMS4 ", " GQA_SUMS5 ", " GQA_SUMS6
                          ", " GQA_SUMS7 ", " GQA_SUMS8 ", " GQA_SUMS9 ", " GQA_SUMS10 ", " GQA_SUMS11 ", " GQA_SUMS12
                          ", " GQA_SUMS13 ", " GQA_SUMS14 ", " GQA_SUMS15,
                GQA_LIST(GQA_PLUS8(d, 0), GQA_PLUS8(d, 8), GQA_PLUS8(d, 16), GQA_PLUS8(d, 24), GQA_PLUS8(d, 32),
                         GQA_PLUS8(d, 40), GQA_PLUS8(d, 48), GQA_PLUS8(d, 56), GQA_PLUS8(d, 64), GQA_PLUS8(d, 72),
                         GQA_PLUS8(d, 80), GQA_PLUS8(d, 88), GQA_PLUS8(d, 96), GQA_PLUS8(d, 104), GQA_PLUS8(d, 112),
                         GQA_PLUS8(d, 120)),
                "%128", "%129", "%130", "%131", "%132", "%133");

#undef GQA_WGMMA_TYPES
#undef GQA_LIST
#undef GQA_WGMMA
#undef GQA_PLUS8
#undef GQA_SUMS0
#undef GQA_SUMS1
#undef GQA_SUMS2
#undef GQA_SUMS3
#undef GQA_SUMS4
#undef GQA_SUMS5
#undef GQA_SUMS6
#undef GQA_SUMS7
#undef GQA_SUMS8
#undef GQA_SUMS9
#undef GQA_SUMS10
#undef GQA_SUMS11
#undef GQA_SUMS12
#undef GQA_SUMS13
#undef GQA_SUMS14
#undef GQA_SUMS15

}  // namespace gqa::cuda
