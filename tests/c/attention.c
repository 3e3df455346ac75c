/*
 * Runs gqa_attention_prefill or gqa_attention_decode on data from a file, without torch and without Python.
 *
 *   attention INPUT OUTPUT cpu|cuda
 *
 * INPUT: the header below, then q, k, v, k_cache, v_cache (the caches if capacity > 0), cache_seqlens (int32).
 * OUTPUT: out, lse, and the caches if any. Prints the kernels launched, one a line.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "gqa_kernels.h"

#ifdef GQA_TEST_CUDA
#include <cuda_runtime_api.h>
#endif

typedef struct {
  int32_t decode, dtype, batch, seqlen, q_heads, kv_heads, head_dim, capacity, causal, num_splits;
  float softmax_scale, softcap;
} header;

enum { Q, K, V, K_CACHE, V_CACHE, LENGTHS, OUT, LSE, BUFFERS };

static void die(const char *what, const char *why) {
  fprintf(stderr, "%s: %s\n", what, why);
  exit(2);
}

static void must(gqa_status status, const char *what) {
  if (status != GQA_STATUS_OK) die(what, gqa_status_string(status));
}

static void print_launch(void *user, const gqa_launch *launch) {
  (void)user;
  printf("%s %s %s %d\n", launch->op, launch->kernel, launch->dtype, (int)launch->num_splits);
}

static void set_strides(int64_t *stride, const header *h, int64_t rows, int64_t heads) {
  stride[0] = rows * heads * h->head_dim;
  stride[1] = heads * h->head_dim;
  stride[2] = h->head_dim;
}

static void fill(gqa_attention_params *p, const header *h, void **buffer) {
  memset(p, 0, sizeof(*p));
  p->struct_size = sizeof(*p);
  p->dtype = h->dtype;
  p->q = buffer[Q];
  p->k = buffer[K];
  p->v = buffer[V];
  p->out = buffer[OUT];
  p->lse = buffer[LSE];
  p->batch = h->batch;
  p->seqlen_q = p->seqlen_k = h->seqlen;
  p->num_q_heads = h->q_heads;
  p->num_kv_heads = h->kv_heads;
  p->head_dim = h->head_dim;
  p->causal = h->causal;
  p->window_left = p->window_right = -1;
  p->softmax_scale = h->softmax_scale;
  p->softcap = h->softcap;
  p->num_splits = h->num_splits;
  set_strides(p->q_stride, h, h->seqlen, h->q_heads);
  set_strides(p->out_stride, h, h->seqlen, h->q_heads);
  set_strides(p->k_stride, h, h->seqlen, h->kv_heads);
  set_strides(p->v_stride, h, h->seqlen, h->kv_heads);
  if (h->capacity == 0) return;
  p->k_cache = buffer[K_CACHE];
  p->v_cache = buffer[V_CACHE];
  p->cache_capacity = h->capacity;
  p->cache_seqlens.data = buffer[LENGTHS];
  p->cache_seqlens.dtype = GQA_DTYPE_INT32;
  p->cache_seqlens.stride[0] = 1;
  set_strides(p->k_cache_stride, h, h->capacity, h->kv_heads);
  set_strides(p->v_cache_stride, h, h->capacity, h->kv_heads);
}

/* Three uneven ranges, the last one first: rows may be computed in any order, on any thread. */
static void run_cpu(const header *h, void **buffer) {
  gqa_attention_params p;
  int64_t rows, cut[4];
  int i;
  fill(&p, h, buffer);
  rows = h->decode ? gqa_attention_decode_rows(&p) : gqa_attention_prefill_rows(&p);
  cut[0] = 0;
  cut[1] = rows / 5;
  cut[2] = rows / 2;
  cut[3] = rows;
  for (i = 2; i >= 0; --i) {
    must(h->decode ? gqa_attention_decode_cpu(&p, cut[i], cut[i + 1])
                   : gqa_attention_prefill_cpu(&p, cut[i], cut[i + 1]),
         "cpu");
  }
}

#ifdef GQA_TEST_CUDA
static void must_cuda(cudaError_t error, const char *what) {
  if (error != cudaSuccess) die(what, cudaGetErrorString(error));
}

static void run_cuda(const header *h, void **buffer, const size_t *size) {
  void *on_device[BUFFERS] = {NULL};
  gqa_attention_params p;
  gqa_device device;
  cudaStream_t stream;
  int i;
  must_cuda(cudaStreamCreate(&stream), "stream");
  for (i = 0; i < BUFFERS; ++i) {
    if (size[i] == 0) continue;
    must_cuda(cudaMalloc(&on_device[i], size[i]), "malloc");
    must_cuda(cudaMemcpyAsync(on_device[i], buffer[i], size[i], cudaMemcpyHostToDevice, stream), "copy to the device");
  }
  fill(&p, h, on_device);
  must(gqa_current_device(&device), "current_device");
  p.workspace_size =
      h->decode ? gqa_attention_decode_workspace_size(&p, &device) : gqa_attention_prefill_workspace_size(&p, &device);
  if (p.workspace_size > 0) must_cuda(cudaMalloc(&p.workspace, (size_t)p.workspace_size), "malloc");
  must(h->decode ? gqa_attention_decode_cuda(&p, stream) : gqa_attention_prefill_cuda(&p, stream),
       gqa_last_cuda_error());
  for (i = 0; i < BUFFERS; ++i) {
    if (size[i] == 0) continue;
    must_cuda(cudaMemcpyAsync(buffer[i], on_device[i], size[i], cudaMemcpyDeviceToHost, stream), "copy to the host");
  }
  must_cuda(cudaStreamSynchronize(stream), "synchronize");
}
#endif

int main(int argc, char **argv) {
  header h;
  size_t size[BUFFERS], element;
  void *buffer[BUFFERS];
  FILE *file;
  int i;
  if (argc != 4) die("usage", "attention INPUT OUTPUT cpu|cuda");
  file = fopen(argv[1], "rb");
  if (file == NULL || fread(&h, sizeof(h), 1, file) != 1) die(argv[1], "no header");
  element = h.dtype == GQA_DTYPE_FLOAT32 ? 4 : 2;
  size[Q] = size[OUT] = element * h.batch * h.seqlen * h.q_heads * h.head_dim;
  size[K] = size[V] = element * h.batch * h.seqlen * h.kv_heads * h.head_dim;
  size[K_CACHE] = size[V_CACHE] = element * h.batch * h.capacity * h.kv_heads * h.head_dim;
  size[LENGTHS] = h.capacity > 0 ? sizeof(int32_t) * h.batch : 0;
  size[LSE] = sizeof(float) * h.batch * h.q_heads * h.seqlen;
  for (i = 0; i < BUFFERS; ++i) {
    buffer[i] = malloc(size[i] + 1);
    memset(buffer[i], 0xff, size[i]);
    if (i < OUT && size[i] > 0 && fread(buffer[i], size[i], 1, file) != 1) die(argv[1], "too short");
  }
  fclose(file);

  gqa_set_launch_log(print_launch, NULL);
  if (strcmp(argv[3], "cuda") == 0) {
#ifdef GQA_TEST_CUDA
    run_cuda(&h, buffer, size);
#else
    die(argv[3], "compiled without CUDA");
#endif
  } else {
    run_cpu(&h, buffer);
  }

  file = fopen(argv[2], "wb");
  if (file == NULL) die(argv[2], "cannot write");
  fwrite(buffer[OUT], size[OUT], 1, file);
  fwrite(buffer[LSE], size[LSE], 1, file);
  if (h.capacity > 0) {
    fwrite(buffer[K_CACHE], size[K_CACHE], 1, file);
    fwrite(buffer[V_CACHE], size[V_CACHE], 1, file);
  }
  fclose(file);
  for (i = 0; i < BUFFERS; ++i) free(buffer[i]);
  return 0;
}
