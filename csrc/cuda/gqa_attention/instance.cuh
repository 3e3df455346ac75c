// Defines the two kernels of one dtype and width, for few rows and for many. Included by one small file each.
#pragma once

#include "cuda/gqa_attention/attend.cuh"

#define GQA_ATTEND_INSTANCE(T, width)                                \
  template <>                                                        \
  gqa::cuda::AttendKernel gqa::cuda::attend_kernel<T, width>() {     \
    return attend<T, width>;                                         \
  }                                                                  \
  template <>                                                        \
  gqa::cuda::AttendKernel gqa::cuda::attend_kernel<T, 4 + width>() { \
    return attend<T, 4 + width>;                                     \
  }                                                                  \
  static_assert(gqa::kAttentionDims == 4)
