/*
 * One attention layer as an engine drives it, in C alone: a prefill that fills the KV cache, then decode steps that
 * each append one token, on the CPU and, where there is one, on a CUDA device. A plain loop checks every row of both.
 *
 * Exit status: 0 where everything agrees, 1 where a result is wrong, 2 where a call fails.
 */
#include <float.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cuda_driver.h"
#include "gqa_kernels.h"

enum {
  BATCH = 2,
  PROMPT = 37,
  STEPS = 5,
  TOKENS = PROMPT + STEPS,
  CAPACITY = 64, /* rows of the cache for each sequence */
  Q_HEADS = 8,
  KV_HEADS = 2,
  HEAD_DIM = 64,
};

/* Every tensor of the example, in the memory of one device. */
typedef struct tensors {
  float *q, *k, *v, *out;   /* [BATCH, TOKENS, heads, HEAD_DIM] */
  float *k_cache, *v_cache; /* [BATCH, CAPACITY, KV_HEADS, HEAD_DIM] */
  int32_t *cache_seqlens;   /* [BATCH] */
} tensors;

static const size_t Q_BYTES = sizeof(float) * BATCH * TOKENS * Q_HEADS * HEAD_DIM;
static const size_t KV_BYTES = sizeof(float) * BATCH * TOKENS * KV_HEADS * HEAD_DIM;
static const size_t CACHE_BYTES = sizeof(float) * BATCH * CAPACITY * KV_HEADS * HEAD_DIM;

static void fail(const char *what, const char *why) {
  fprintf(stderr, "%s: %s\n", what, why);
  exit(2);
}

/* Every call returns a status; this is all the error handling that a caller needs. */
static void check(gqa_status status, const char *what) {
  if (status == GQA_STATUS_CUDA_ERROR) fail(what, gqa_last_cuda_error());
  if (status != GQA_STATUS_OK) fail(what, gqa_status_string(status));
}

static void check_cuda(int error, const char *what) {
  if (error != 0) fail(what, "the CUDA driver refused");
}

/* The launch log: called on the launching thread before each CUDA launch. */
static void print_launch(void *user, const gqa_launch *launch) {
  ++*(int *)user;
  printf("  launch %s: %s %s, grid %d x %d x %d, %d threads, %d splits\n", launch->op, launch->kernel, launch->dtype,
         (int)launch->grid[0], (int)launch->grid[1], (int)launch->grid[2], (int)launch->block[0],
         (int)launch->num_splits);
}

static void set_stride(int64_t stride[3], int64_t rows, int64_t heads) {
  stride[0] = rows * heads * HEAD_DIM; /* batch */
  stride[1] = heads * HEAD_DIM;        /* token */
  stride[2] = HEAD_DIM;                /* head */
}

/* The tokens [first, first + count) of all sequences: views by pointer and stride, nothing is copied. */
static gqa_attention_params params_of(const tensors *t, int64_t first, int64_t count) {
  gqa_attention_params p;
  memset(&p, 0, sizeof(p)); /* what is zero is absent */
  p.struct_size = sizeof(p);
  p.dtype = GQA_DTYPE_FLOAT32;
  p.batch = BATCH;
  p.seqlen_q = p.seqlen_k = count;
  p.num_q_heads = Q_HEADS;
  p.num_kv_heads = KV_HEADS;
  p.head_dim = HEAD_DIM;
  p.causal = 1;
  p.window_left = p.window_right = -1;
  p.softmax_scale = 1.0f / sqrtf(HEAD_DIM);

  p.q = t->q + first * Q_HEADS * HEAD_DIM;
  p.k = t->k + first * KV_HEADS * HEAD_DIM;
  p.v = t->v + first * KV_HEADS * HEAD_DIM;
  p.out = t->out + first * Q_HEADS * HEAD_DIM;
  set_stride(p.q_stride, TOKENS, Q_HEADS);
  set_stride(p.out_stride, TOKENS, Q_HEADS);
  set_stride(p.k_stride, TOKENS, KV_HEADS);
  set_stride(p.v_stride, TOKENS, KV_HEADS);

  p.k_cache = t->k_cache;
  p.v_cache = t->v_cache;
  p.cache_capacity = CAPACITY;
  set_stride(p.k_cache_stride, CAPACITY, KV_HEADS);
  set_stride(p.v_cache_stride, CAPACITY, KV_HEADS);
  p.cache_seqlens.data = t->cache_seqlens;
  p.cache_seqlens.dtype = GQA_DTYPE_INT32;
  p.cache_seqlens.stride[0] = 1;
  return p;
}

static void set_lengths(int32_t *cache_seqlens, int32_t length) {
  for (int b = 0; b < BATCH; ++b) cache_seqlens[b] = length;
}

/* One thread computes all rows here; a threaded caller gives each of its threads a range of them. */
static void run_on_cpu(tensors *t) {
  gqa_attention_params p = params_of(t, 0, PROMPT);
  set_lengths(t->cache_seqlens, 0); /* tokens in the cache before the call; the library never changes them */
  check(gqa_attention_prefill_cpu(&p, 0, gqa_attention_prefill_rows(&p)), "prefill");
  for (int step = PROMPT; step < TOKENS; ++step) {
    p = params_of(t, step, 1);
    set_lengths(t->cache_seqlens, step);
    check(gqa_attention_decode_cpu(&p, 0, gqa_attention_decode_rows(&p)), "decode");
  }
}

static void *device_copy(const cuda_driver *cuda, const void *host, size_t bytes) {
  cuda_address address;
  check_cuda(cuda->allocate(&address, bytes), "allocate");
  if (host != NULL) check_cuda(cuda->upload(address, host, bytes, cuda->stream), "upload");
  return (void *)(uintptr_t)address;
}

static void run_on_cuda(const cuda_driver *cuda, const tensors *host) {
  tensors t;
  gqa_device device;
  int64_t workspace_size = 0;
  void *workspace = NULL;
  check(gqa_current_device(&device), "device");
  t.q = device_copy(cuda, host->q, Q_BYTES);
  t.k = device_copy(cuda, host->k, KV_BYTES);
  t.v = device_copy(cuda, host->v, KV_BYTES);
  t.out = device_copy(cuda, NULL, Q_BYTES);
  t.k_cache = device_copy(cuda, NULL, CACHE_BYTES);
  t.v_cache = device_copy(cuda, NULL, CACHE_BYTES);
  t.cache_seqlens = device_copy(cuda, NULL, sizeof(int32_t) * BATCH);

  for (int first = 0; first < TOKENS;) {
    const int decode = first > 0, count = decode ? 1 : PROMPT;
    gqa_attention_params p = params_of(&t, first, count);
    const int64_t wanted =
        decode ? gqa_attention_decode_workspace_size(&p, &device) : gqa_attention_prefill_workspace_size(&p, &device);
    if (wanted > workspace_size) { /* the caller owns all memory; a workspace serves one call after the other */
      check_cuda(cuda->stream_wait(cuda->stream), "wait");
      if (workspace != NULL) check_cuda(cuda->release((uintptr_t)workspace), "release");
      workspace = device_copy(cuda, NULL, (size_t)wanted);
      workspace_size = wanted;
    }
    p.workspace = workspace;
    p.workspace_size = workspace_size;
    set_lengths(host->cache_seqlens, first);
    check_cuda(cuda->upload((uintptr_t)t.cache_seqlens, host->cache_seqlens, sizeof(int32_t) * BATCH, cuda->stream),
               "upload");
    check(decode ? gqa_attention_decode_cuda(&p, cuda->stream) : gqa_attention_prefill_cuda(&p, cuda->stream),
          decode ? "decode" : "prefill");
    check_cuda(cuda->stream_wait(cuda->stream), "wait"); /* before the host's lengths change */
    first += count;
  }

  check_cuda(cuda->download(host->out, (uintptr_t)t.out, Q_BYTES, cuda->stream), "download");
  check_cuda(cuda->stream_wait(cuda->stream), "wait");
  void *const all[] = {t.q, t.k, t.v, t.out, t.k_cache, t.v_cache, t.cache_seqlens, workspace};
  for (size_t i = 0; i < sizeof(all) / sizeof(all[0]); ++i) {
    if (all[i] != NULL) check_cuda(cuda->release((uintptr_t)all[i]), "release");
  }
}

static const float *row(const float *tensor, int heads, int b, int token, int head) {
  return tensor + (((size_t)b * TOKENS + token) * heads + head) * HEAD_DIM;
}

/* softmax(q k^T * scale) v in double, a query and a head at a time: what the kernels must say. */
static double largest_error(const tensors *t, double *allowed) {
  double error = 0, largest_score = 0, largest_value = 0;
  *allowed = 0;
  for (int b = 0; b < BATCH; ++b) {
    for (int head = 0; head < Q_HEADS; ++head) {
      const int kv_head = head / (Q_HEADS / KV_HEADS);
      for (int token = 0; token < TOKENS; ++token) {
        double weight[TOKENS], out[HEAD_DIM] = {0}, sum = 0;
        for (int key = 0; key <= token; ++key) {
          double score = 0;
          for (int d = 0; d < HEAD_DIM; ++d) {
            score += (double)row(t->q, Q_HEADS, b, token, head)[d] * row(t->k, KV_HEADS, b, key, kv_head)[d];
          }
          score /= sqrt(HEAD_DIM);
          largest_score = fmax(largest_score, fabs(score));
          weight[key] = exp(score);
          sum += weight[key];
        }
        for (int key = 0; key <= token; ++key) {
          for (int d = 0; d < HEAD_DIM; ++d) {
            const double value = row(t->v, KV_HEADS, b, key, kv_head)[d];
            largest_value = fmax(largest_value, fabs(value));
            out[d] += weight[key] / sum * value;
          }
        }
        for (int d = 0; d < HEAD_DIM; ++d) {
          const double difference = fabs(row(t->out, Q_HEADS, b, token, head)[d] - out[d]);
          if (isnan(difference)) return NAN;
          error = fmax(error, difference);
        }
      }
    }
  }
  *allowed = 8 * FLT_EPSILON * (1 + largest_score) * largest_value;
  return error;
}

static int judge(const char *device, tensors *t) {
  double allowed, error = largest_error(t, &allowed);
  const int right = error <= allowed;
  printf("%s: prefill of %d tokens and %d decode steps, largest error %.1e, allowed %.1e: %s\n", device, PROMPT, STEPS,
         error, allowed, right ? "ok" : "WRONG");
  memset(t->out, 0xff, Q_BYTES); /* NaN, for whoever writes next */
  return right;
}

static float *allocate(size_t bytes) {
  float *memory = malloc(bytes);
  if (memory == NULL) fail("malloc", "out of memory");
  memset(memory, 0xff, bytes);
  return memory;
}

static void fill(float *values, size_t bytes) {
  static uint32_t state = 1;
  for (size_t i = 0; i < bytes / sizeof(float); ++i) {
    state = state * 1664525u + 1013904223u;
    values[i] = (float)(state >> 8) / 8388608.0f - 1.0f; /* from -1 to 1 */
  }
}

/* What a wrong call gets: a status and a sentence, never a crash. */
static void show_refusals(const tensors *t) {
  gqa_attention_params p = params_of(t, 0, PROMPT);
  p.struct_size -= 8; /* as of a program compiled against an older header */
  printf("old struct: %s\n", gqa_status_string(gqa_attention_prefill_cpu(&p, 0, 1)));
  p = params_of(t, 0, PROMPT);
  p.num_kv_heads = 3; /* does not divide the query heads */
  printf("8 query heads over 3: %s\n", gqa_status_string(gqa_attention_prefill_cpu(&p, 0, 1)));
}

int main(void) {
  tensors t = {allocate(Q_BYTES),
               allocate(KV_BYTES),
               allocate(KV_BYTES),
               allocate(Q_BYTES),
               allocate(CACHE_BYTES),
               allocate(CACHE_BYTES),
               calloc(BATCH, sizeof(int32_t))};
  cuda_driver cuda;
  int launches = 0, right;
  if (t.cache_seqlens == NULL) fail("calloc", "out of memory");
  fill(t.q, Q_BYTES);
  fill(t.k, KV_BYTES);
  fill(t.v, KV_BYTES);
  printf("gqa_kernels %s, CUDA kernels: %s\n", gqa_version(), gqa_cuda_archs()[0] ? gqa_cuda_archs() : "not built");
  gqa_set_launch_log(print_launch, &launches);

  run_on_cpu(&t);
  right = judge("cpu", &t);

  const char *missing = gqa_cuda_archs()[0] ? cuda_driver_open(&cuda) : gqa_status_string(GQA_STATUS_NOT_BUILT);
  if (missing != NULL) {
    printf("cuda: skipped, %s\n", missing);
  } else {
    run_on_cuda(&cuda, &t);
    right = judge("cuda", &t) && right;
    printf("the launch log saw %d launches\n", launches);
  }

  show_refusals(&t);
  gqa_set_launch_log(NULL, NULL);
  free(t.q);
  free(t.k);
  free(t.v);
  free(t.out);
  free(t.k_cache);
  free(t.v_cache);
  free(t.cache_seqlens);
  return right ? 0 : 1;
}
