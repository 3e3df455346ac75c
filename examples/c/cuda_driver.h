/*
 * The few calls of the CUDA driver that the example needs, looked up at run time: the program builds without a CUDA
 * toolkit and runs without a driver. A program that links the CUDA runtime uses cudaMalloc and the rest instead.
 */
#ifndef CUDA_DRIVER_H
#define CUDA_DRIVER_H

#include <dlfcn.h>
#include <stddef.h>

#include "gqa_kernels.h"

typedef unsigned long long cuda_address;

typedef struct cuda_driver {
  struct CUstream_st *stream;
  int (*init)(unsigned flags);
  int (*device_get)(int *device, int index);
  int (*context_retain)(void **context, int device);
  int (*context_set)(void *context);
  int (*stream_create)(struct CUstream_st **stream, unsigned flags);
  int (*stream_wait)(struct CUstream_st *stream);
  int (*allocate)(cuda_address *address, size_t bytes);
  int (*release)(cuda_address address);
  int (*upload)(cuda_address to, const void *from, size_t bytes, struct CUstream_st *stream);
  int (*download)(void *to, cuda_address from, size_t bytes, struct CUstream_st *stream);
} cuda_driver;

/* Loads the driver and makes the first device current. Returns NULL, or why there is no device. */
static inline const char *cuda_driver_open(cuda_driver *driver) {
  const struct {
    const char *name;
    void *place; /* dlsym gives an object pointer; ISO C converts it to a function's only through memory */
  } symbols[] = {
      {"cuInit", &driver->init},
      {"cuDeviceGet", &driver->device_get},
      {"cuDevicePrimaryCtxRetain", &driver->context_retain},
      {"cuCtxSetCurrent", &driver->context_set},
      {"cuStreamCreate", &driver->stream_create},
      {"cuStreamSynchronize", &driver->stream_wait},
      {"cuMemAlloc_v2", &driver->allocate},
      {"cuMemFree_v2", &driver->release},
      {"cuMemcpyHtoDAsync_v2", &driver->upload},
      {"cuMemcpyDtoHAsync_v2", &driver->download},
  };
  void *library = dlopen("libcuda.so.1", RTLD_NOW);
  void *context;
  int device;
  if (library == NULL) return "no CUDA driver on this machine";
  for (size_t i = 0; i < sizeof(symbols) / sizeof(symbols[0]); ++i) {
    void *symbol = dlsym(library, symbols[i].name);
    if (symbol == NULL) return "the CUDA driver is too old";
    *(void **)symbols[i].place = symbol;
  }
  if (driver->init(0) != 0 || driver->device_get(&device, 0) != 0) return "no CUDA device on this machine";
  if (driver->context_retain(&context, device) != 0 || driver->context_set(context) != 0) {
    return "the CUDA device gives no context";
  }
  return driver->stream_create(&driver->stream, 0) == 0 ? NULL : "the CUDA device gives no stream";
}

#endif
