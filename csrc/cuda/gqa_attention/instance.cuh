// Defines the two kernels of one dtype and width: for few rows and for many.
#pragma once

#include "cuda/gqa_attention/attend.cuh"

#define GQA_ATTEND_INSTANCE(T, width)                       \
  namespace gqa::cuda {                                     \
  template <>                                               \
  AttendKernel attend_kernel<T, width>() {                  \
    return attend<T, width>;                                \
  }                                                         \
  template <>                                               \
  AttendKernel attend_kernel<T, kAttentionDims + width>() { \
    return attend<T, kAttentionDims + width>;               \
  }                                                         \
  }                                                         \
  static_assert(true)
