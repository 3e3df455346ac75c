/*
 * gqa_kernels: the kernels of a Llama-family decoder behind a plain C99 interface.
 *
 * Every op has one params struct and these functions:
 *   gqa_<op>_cuda(params, stream)                launches on the given stream, never synchronises
 *   gqa_<op>_cpu(params, first_row, last_row)    computes the rows [first_row, last_row) on the calling thread
 *   gqa_<op>_rows(params)                        how many rows the CPU twin divides the work into
 *   gqa_<op>_plan(params, device, plan)          which CUDA kernels would run, without running them
 *
 * Conventions
 *   - Set struct_size to sizeof the struct and zero the rest before filling it in.
 *   - Sizes are element counts. Strides are in elements; the last dimension always has stride 1.
 *   - B batch, Sq/Sk query/key length, Hq/Hkv query/KV heads (Hq % Hkv == 0), D head_dim.
 *   - No function allocates (but gqa_decoder_step_cpu), synchronises, prints, throws or reads the environment.
 *   - Rows of different calls may run on different threads; a CUDA call must be made with its device current.
 */
#ifndef GQA_KERNELS_H
#define GQA_KERNELS_H

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define GQA_API __attribute__((visibility("default")))
#else
#define GQA_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define GQA_KERNELS_VERSION "0.1.0"

struct CUstream_st; /* cudaStream_t is a pointer to it */

typedef enum gqa_status {
  GQA_STATUS_OK = 0,
  GQA_STATUS_STRUCT_SIZE = 1,         /* struct_size is not this library's */
  GQA_STATUS_NULL_POINTER = 2,        /* a required pointer is NULL */
  GQA_STATUS_INVALID_ARGUMENT = 3,    /* a size, ratio or setting is out of range */
  GQA_STATUS_UNSUPPORTED = 4,         /* valid, but no kernel serves it */
  GQA_STATUS_WORKSPACE_TOO_SMALL = 5, /* see gqa_<op>_plan: workspace_size */
  GQA_STATUS_NOT_BUILT = 6,           /* this library was built without CUDA */
  GQA_STATUS_CUDA_ERROR = 7           /* the CUDA runtime refused; see gqa_last_cuda_error() */
} gqa_status;

typedef enum gqa_dtype {
  GQA_DTYPE_FLOAT32 = 0,
  GQA_DTYPE_FLOAT16 = 1,
  GQA_DTYPE_BFLOAT16 = 2,
  GQA_DTYPE_INT32 = 3,
  GQA_DTYPE_INT64 = 4,
  GQA_DTYPE_FLOAT8_E4M3 = 5, /* no infinities, largest value 448 */
  GQA_DTYPE_INT8 = 6
} gqa_dtype;

/* One kernel launch: what a plan foresees and what the launch log reports. */
typedef struct gqa_launch {
  const char *op;     /* "rmsnorm" */
  const char *kernel; /* "rmsnorm_row" */
  const char *dtype;  /* "bfloat16" */
  int32_t grid[3];
  int32_t block[3];
  int32_t shared_memory; /* dynamic shared memory, bytes */
  int32_t num_splits;    /* parts the keys are divided into; 1 where that means nothing */
  int32_t variant;       /* internal: which instance of the kernel */
} gqa_launch;

#define GQA_MAX_LAUNCHES 4

typedef struct gqa_plan {
  int32_t num_launches;
  gqa_launch launches[GQA_MAX_LAUNCHES]; /* in order of launch */
  int64_t workspace_size;                /* bytes the op needs at `workspace`, 0 if none */
  const char *reason;                    /* one sentence: why this kernel and not another */
} gqa_plan;

typedef struct gqa_device {
  int32_t compute_capability; /* 90 for sm_90 */
  int32_t num_sms;
  int32_t max_shared_memory; /* bytes one block may use */
  int32_t l2_size;           /* bytes */
} gqa_device;

/* An integer tensor with up to two dimensions, int32 or int64. A stride of 0 broadcasts. */
typedef struct gqa_index {
  const void *data; /* NULL when absent */
  int32_t dtype;    /* GQA_DTYPE_INT32 or GQA_DTYPE_INT64 */
  int64_t stride[2];
} gqa_index;

/* Rotary embedding tables. Angles of token t are row `position(t)` of a table, or row t of gathered tables. */
typedef struct gqa_rotary {
  const void *cos;     /* [num_positions, dim / 2], or gathered [B or 1, S, dim / 2]; NULL: no rotation */
  const void *sin;     /* like cos */
  int32_t dtype;       /* of cos and sin: float32 or the op's dtype */
  int32_t dim;         /* rotated dimensions, even, <= D; the rest passes through */
  int32_t gathered;    /* 0: table indexed by position; 1: one row per token */
  int32_t interleaved; /* 0: pairs (i, i + dim/2); 1: pairs (2i, 2i + 1) */
  int64_t num_positions;
  int64_t stride_batch; /* gathered only; 0 broadcasts */
  int64_t stride_row;
  gqa_index positions; /* [B, S] position of each token; absent: the op's default */
} gqa_rotary;

/* ---------------------------------------------------------------------------------------------- norms -- */

/* out = x / sqrt(mean(x^2) + eps) * (weight + weight_offset), over the last dimension. */
typedef struct gqa_rmsnorm_params {
  uint32_t struct_size;
  int32_t dtype;        /* of x and out */
  int32_t weight_dtype; /* float32 or dtype */
  const void *x;        /* [rows[0], rows[1], hidden] */
  const void *weight;   /* [hidden] */
  void *out;            /* [rows[0], rows[1], hidden] */
  int64_t rows[2];
  int64_t hidden;
  int64_t x_stride[2];
  int64_t out_stride[2];
  float eps;
  float weight_offset;
  int32_t cast_before_weight; /* 1: round the normalised value to dtype, then multiply (Llama) */
} gqa_rmsnorm_params;

/* residual_out = x + residual, rounded to dtype; out = rmsnorm(residual_out). */
typedef struct gqa_add_rmsnorm_params {
  uint32_t struct_size;
  int32_t dtype;
  int32_t weight_dtype;
  const void *x;        /* [rows[0], rows[1], hidden] */
  const void *residual; /* [rows[0], rows[1], hidden] */
  const void *weight;   /* [hidden] */
  void *out;            /* [rows[0], rows[1], hidden] */
  void *residual_out;   /* [rows[0], rows[1], hidden] */
  int64_t rows[2];
  int64_t hidden;
  int64_t x_stride[2];
  int64_t residual_stride[2];
  int64_t out_stride[2];
  int64_t residual_out_stride[2];
  float eps;
  float weight_offset;
  int32_t cast_before_weight;
} gqa_add_rmsnorm_params;

/* out = x + residual. */
typedef struct gqa_residual_add_params {
  uint32_t struct_size;
  int32_t dtype;
  const void *x;        /* [rows[0], rows[1], hidden] */
  const void *residual; /* [rows[0], rows[1], hidden] */
  void *out;            /* [rows[0], rows[1], hidden] */
  int64_t rows[2];
  int64_t hidden;
  int64_t x_stride[2];
  int64_t residual_stride[2];
  int64_t out_stride[2];
} gqa_residual_add_params;

/* out = silu(gate) * up; silu is rounded to dtype before the product, as the two PyTorch ops do. */
typedef struct gqa_swiglu_params {
  uint32_t struct_size;
  int32_t dtype;
  const void *gate; /* [rows[0], rows[1], hidden] */
  const void *up;   /* [rows[0], rows[1], hidden] */
  void *out;        /* [rows[0], rows[1], hidden] */
  int64_t rows[2];
  int64_t hidden;
  int64_t gate_stride[2];
  int64_t up_stride[2];
  int64_t out_stride[2];
} gqa_swiglu_params;

/*
 * out = residual + (x w^T + bias) for few tokens, of one to three matrices at once: their outputs side by side. Sums in
 * float32, each multiplied by the scale of its output where weights have one, rounded with the bias once. CUDA serves
 * 1 ... 16 tokens of float16 or bfloat16 on sm_90; in_features is a multiple of 8, of float8_e4m3 weights of 16, and
 * rows begin at multiples of 16 bytes.
 */
typedef struct gqa_linear_params {
  uint32_t struct_size;
  int32_t dtype;
  const void *x;          /* [tokens, in_features] */
  const void *weights[3]; /* [out_features[i], in_features]; NULL where out_features[i] is 0 */
  const float
      *weight_scale;    /* [sum of out_features] contiguous: the weights are float8_e4m3; NULL: they are of dtype */
  const void *bias;     /* [sum of out_features] contiguous, or NULL */
  const void *residual; /* [tokens, sum of out_features]: added to the rounded products, rounded again; or NULL */
  void *out;            /* [tokens, sum of out_features] */
  int64_t tokens;
  int64_t in_features;
  int64_t out_features[3]; /* the second and third may be 0 */
  int64_t x_stride;
  int64_t weight_stride[3]; /* in elements of the weights */
  int64_t residual_stride;
  int64_t out_stride;
  int32_t static_weights; /* 1: nothing that may still run on the device writes the weights; they are read early */
} gqa_linear_params;

/*
 * The feed-forward block for few tokens: activation = swiglu(x w_gate^T, x w_up^T), out = residual + activation
 * w_down^T. Sums in float32, times their scales; each matrix product, the silu and the activation are rounded to dtype.
 * CUDA serves 1 ... 16 tokens of float16 or bfloat16 on sm_90; hidden and intermediate are multiples of 8, before
 * float8_e4m3 weights of 16, and rows begin at multiples of 16 bytes.
 */
typedef struct gqa_swiglu_ffn_params {
  uint32_t struct_size;
  int32_t dtype;
  const void *x;             /* [tokens, hidden] */
  const void *w_gate;        /* [intermediate, hidden] */
  const void *w_up;          /* [intermediate, hidden] */
  const void *w_down;        /* [out_features, intermediate] */
  const float *w_gate_scale; /* [intermediate] contiguous: w_gate is float8_e4m3; NULL: it is of dtype */
  const float *w_up_scale;   /* [intermediate] likewise; both or neither */
  const float *w_down_scale; /* [out_features] likewise */
  const void *residual;      /* [tokens, out_features]: added to the rounded result, rounded again; or NULL */
  void *activation;          /* [tokens, intermediate] contiguous scratch: what the first half hands to the second */
  void *out;                 /* [tokens, out_features] contiguous */
  int64_t tokens;
  int64_t hidden;
  int64_t intermediate;
  int64_t out_features;
  int64_t x_stride;
  int64_t w_gate_stride;
  int64_t w_up_stride;
  int64_t w_down_stride;
  int64_t residual_stride;
  int32_t static_weights; /* as in gqa_linear_params */
} gqa_swiglu_ffn_params;

/* ----------------------------------------------------------------------------------------------- rope -- */

/* Rotates q and k. In place when q_out == q (k_out == k) with equal strides. Default position of token s: s. */
typedef struct gqa_rope_params {
  uint32_t struct_size;
  int32_t dtype;
  const void *q; /* [B, S, Hq, D] */
  const void *k; /* [B, S, Hkv, D] or NULL */
  void *q_out;
  void *k_out;
  int64_t batch;
  int64_t seqlen;
  int32_t num_q_heads;
  int32_t num_kv_heads;
  int32_t head_dim;
  int64_t q_stride[3]; /* batch, token, head */
  int64_t k_stride[3];
  int64_t q_out_stride[3];
  int64_t k_out_stride[3];
  gqa_rotary rotary;
} gqa_rope_params;

/* Each head of q and k normalised over D by its weight, then rotated: rope(rmsnorm(q), rmsnorm(k)) to the bit. In place
 * and positions as in gqa_rope_params. */
typedef struct gqa_qk_rmsnorm_rope_params {
  uint32_t struct_size;
  int32_t dtype;
  int32_t weight_dtype; /* of both weights: float32 or dtype */
  const void *q;        /* [B, S, Hq, D] */
  const void *k;        /* [B, S, Hkv, D] */
  const void *q_weight; /* [D] */
  const void *k_weight; /* [D] */
  void *q_out;
  void *k_out;
  int64_t batch;
  int64_t seqlen;
  int32_t num_q_heads;
  int32_t num_kv_heads;
  int32_t head_dim;
  int64_t q_stride[3]; /* batch, token, head */
  int64_t k_stride[3];
  int64_t q_out_stride[3];
  int64_t k_out_stride[3];
  gqa_rotary rotary;
  float eps;
  float weight_offset;
  int32_t cast_before_weight;
} gqa_qk_rmsnorm_rope_params;

/* ------------------------------------------------------------------------------------------ attention -- */

/*
 * What quantised caches hold: float8_e4m3 or int8 numbers that stand for themselves times a scale. An append stores
 * x / scale, divided in float32, rounded to nearest even and held within +-448 or +-127; a NaN becomes e4m3's, or 0 in
 * int8. Leave it zeroed where caches have the op's dtype, which for quantised ones is float16 or bfloat16.
 */
typedef struct gqa_kv_quantization {
  int32_t dtype;          /* of both caches: GQA_DTYPE_FLOAT8_E4M3, GQA_DTYPE_INT8, or 0: not quantised */
  const float *k_scale;   /* [Hkv], positive, on the caches' device; NULL: 1 */
  const float *v_scale;   /* like k_scale */
  int64_t k_scale_stride; /* 0: one scale for all heads */
  int64_t v_scale_stride;
} gqa_kv_quantization;

/* Writes k (rotated if asked) and v at rows cache_seqlens[b] ... of each sequence's cache. */
typedef struct gqa_kv_cache_append_params {
  uint32_t struct_size;
  int32_t dtype;
  const void *k;           /* [B, S, Hkv, D], or [tokens, Hkv, D] with cu_seqlens */
  const void *v;           /* like k */
  void *k_cache;           /* [B, capacity, Hkv, D], or [num_pages, page_size, Hkv, D] with block_table */
  void *v_cache;           /* like k_cache */
  gqa_index cache_seqlens; /* [B] tokens before the append */
  gqa_index cu_seqlens;    /* [B + 1] or absent */
  gqa_index cache_leftpad; /* [B] or absent: rows before it are padding, position = row - leftpad */
  gqa_index block_table;   /* [B, max_pages] or absent */
  int64_t batch;
  int64_t seqlen;       /* dense: S; ragged: an upper bound of each row's length */
  int64_t total_tokens; /* ragged: rows of k and v */
  int32_t num_kv_heads;
  int32_t head_dim;
  int64_t cache_capacity; /* rows of a contiguous cache, or max_pages * page_size */
  int64_t num_pages;      /* 0 for a contiguous cache */
  int64_t page_size;
  int64_t k_stride[3]; /* batch, token, head; ragged: [0] unused */
  int64_t v_stride[3];
  int64_t k_cache_stride[3]; /* batch or page, row, head */
  int64_t v_cache_stride[3];
  gqa_rotary rotary;
  gqa_kv_quantization quantization;
} gqa_kv_cache_append_params;

/*
 * softmax(q k^T * scale) v with grouped-query heads, for both prefill and decode.
 *
 * Keys are, in order: the first cache_seqlens[b] rows of the cache, then k and v. Where both a cache and k, v are
 * given, k and v are also written to the cache at rows cache_seqlens[b] ... Query i of Sq sits at key position
 * seqlen_k - Sq + i (bottom-right alignment). Rotation, where tables are given, is applied to q and to k, never to
 * cached keys; the default position of a token is its key position minus cache_leftpad[b]. With a quantised cache the
 * new keys and values, too, count as what the cache holds of them.
 */
typedef struct gqa_attention_params {
  uint32_t struct_size;
  int32_t dtype;
  const void *q;           /* [B, Sq, Hq, D], or [total_q, Hq, D] with cu_seqlens_q */
  const void *k;           /* [B, Sk, Hkv, D], or [total_k, Hkv, D] with cu_seqlens_k, or NULL */
  const void *v;           /* like k */
  void *k_cache;           /* [B, capacity, Hkv, D], or [num_pages, page_size, Hkv, D] with block_table, or NULL */
  void *v_cache;           /* like k_cache */
  void *out;               /* like q */
  float *lse;              /* [B, Hq, Sq] or [Hq, total_q], natural log, contiguous; NULL: not wanted */
  const void *sinks;       /* [Hq] extra logit of each head's softmax, or NULL */
  int32_t sinks_dtype;     /* float32 or dtype */
  gqa_index cache_seqlens; /* [B], tokens in the cache before this call; absent without a cache */
  gqa_index cu_seqlens_q;  /* [B + 1] or absent */
  gqa_index cu_seqlens_k;  /* [B + 1] or absent: with a cache, k is laid out by cu_seqlens_q */
  gqa_index cache_leftpad; /* [B] or absent: first valid key */
  gqa_index block_table;   /* [B, max_pages] or absent */
  int64_t batch;
  int64_t seqlen_q; /* dense: Sq; ragged: an upper bound, a longer row becomes NaN */
  int64_t seqlen_k; /* length of k: dense Sk; ragged: an upper bound, a longer row becomes NaN */
  int64_t total_q;  /* ragged: rows of q */
  int64_t total_k;  /* ragged: rows of k */
  int32_t num_q_heads;
  int32_t num_kv_heads;
  int32_t head_dim;
  int32_t causal;
  int32_t window_left;  /* -1: unlimited; else keys from position - window_left on */
  int32_t window_right; /* -1: unlimited; else keys up to position + window_right */
  int64_t cache_capacity;
  int64_t num_pages;
  int64_t page_size;
  int64_t q_stride[3]; /* batch, token, head; ragged: [0] unused */
  int64_t k_stride[3];
  int64_t v_stride[3];
  int64_t k_cache_stride[3]; /* batch or page, row, head */
  int64_t v_cache_stride[3];
  int64_t out_stride[3];
  gqa_rotary rotary;
  float softmax_scale;
  float softcap;           /* 0: none; else scores become softcap * tanh(score / softcap) */
  int32_t num_splits;      /* 0: chosen by the plan */
  int32_t batch_invariant; /* 1: split points depend on the row's own length only */
  void *workspace;         /* CUDA only: plan.workspace_size bytes, 16-byte aligned, need not be zeroed */
  int64_t workspace_size;
  gqa_kv_quantization quantization; /* of the caches */
  int32_t static_prefix; /* decode; 1: nothing that may still run on the device writes the lengths, left padding, block
                            table or the cached rows below the lengths; they are read early */
} gqa_attention_params;

typedef gqa_attention_params gqa_attention_prefill_params;
/* Decode: causal = 1, a cache, dense q of 1 ... 16 tokens, k and v of the same length or NULL. */
typedef gqa_attention_params gqa_attention_decode_params;

/* Joins attention over parts of the keys: weights exp(lse_i - logsumexp(lse)). */
typedef struct gqa_merge_attention_states_params {
  uint32_t struct_size;
  int32_t dtype;
  const void *outs;  /* [parts, B, Sq, Hq, D] contiguous */
  const float *lses; /* [parts, B, Hq, Sq] contiguous */
  void *out;         /* [B, Sq, Hq, D] contiguous */
  float *lse;        /* [B, Hq, Sq] contiguous */
  int32_t parts;
  int32_t num_q_heads;
  int32_t head_dim;
  int64_t batch;
  int64_t seqlen_q;
} gqa_merge_attention_states_params;

/* ------------------------------------------------------------------------------------------- sampling -- */

/*
 * Draws one token per row. A setting's per-row pointer, where given, replaces its scalar. Where neither seeds nor
 * offsets has a value per row, a row is told apart by its index; where one has, that value alone decides.
 *
 * Before anything else a logit z becomes, in float32: for a token whose count is not 0, z > 0 ? z / repetition :
 * z * repetition; if the count is above 0, then z - frequency * count, then z - presence; plus its bias; -inf where its
 * bit of the mask is 0. A count below 0 marks a token that only the repetition penalty is to see, as of a prompt.
 */
typedef struct gqa_sample_params {
  uint32_t struct_size;
  int32_t dtype;      /* of logits: float32, float16 or bfloat16 */
  const void *logits; /* [rows, vocab] */
  int64_t *ids;       /* [rows], always in [0, vocab) */
  uint8_t *valid;     /* [rows] 0 where the row held a NaN or no logit above -inf, or NULL */
  float *logprob;     /* [rows] natural log, of the token under the adjusted, filtered distribution, or NULL */
  int64_t rows;
  int64_t vocab; /* at most 2^18 */
  int64_t logits_stride;
  float temperature; /* 0: greedy */
  int64_t top_k;     /* <= 0: all */
  float top_p;
  float min_p;
  uint64_t seed;
  uint64_t offset;
  const float *temperatures; /* [rows] or NULL, and so on */
  gqa_index top_ks;
  const float *top_ps;
  const float *min_ps;
  gqa_index seeds;
  gqa_index offsets;
  int64_t temperatures_stride; /* 0: one value for all rows, and so on */
  int64_t top_ps_stride;
  int64_t min_ps_stride;
  const void *logit_bias;            /* [rows, vocab] or NULL */
  const int32_t *allowed_bitmask;    /* [rows, ceil(vocab / 32)], bit i % 32 of word i / 32 is token i's, or NULL */
  const int32_t *token_counts;       /* [rows, vocab]; may be NULL where there is no penalty */
  const float *repetition_penalties; /* [rows] or NULL: 1, and so on */
  const float *frequency_penalties;  /* NULL: 0 */
  const float *presence_penalties;   /* NULL: 0 */
  int64_t logit_bias_stride;         /* 0: one row for all, and so on */
  int64_t allowed_bitmask_stride;
  int64_t token_counts_stride;
  int64_t repetition_penalties_stride;
  int64_t frequency_penalties_stride;
  int64_t presence_penalties_stride;
  int32_t logit_bias_dtype; /* float32 or dtype */
} gqa_sample_params;

/* ---------------------------------------------------------------------------------------- whole models -- */

/* The weights of a decoder layer, dense and contiguous, and its caches. */
typedef struct gqa_decoder_layer {
  const void *q_proj;     /* [Hq * D, hidden] */
  const void *k_proj;     /* [Hkv * D, hidden] */
  const void *v_proj;     /* [Hkv * D, hidden] */
  const void *o_proj;     /* [hidden, Hq * D] */
  const void *gate_proj;  /* [intermediate, hidden] */
  const void *up_proj;    /* [intermediate, hidden] */
  const void *down_proj;  /* [hidden, intermediate] */
  const void *input_norm; /* [hidden] */
  const void *mlp_norm;   /* [hidden] */
  const void *q_bias;     /* [Hq * D], or NULL for all three */
  const void *k_bias;     /* [Hkv * D] */
  const void *v_bias;     /* [Hkv * D] */
  const void *q_norm;     /* [D]: RMSNorm of each head before the rotation, or NULL for both */
  const void *k_norm;     /* [D] */
  void *k_cache;          /* [B, capacity, Hkv, D] */
  void *v_cache;          /* [B, capacity, Hkv, D] */
  int64_t window_left;    /* keys before its own that a query sees, -1: all */
} gqa_decoder_layer;

/*
 * One token of each row through a whole decoder: for each layer RMSNorm, q, k and v, rotation, append and attention
 * over the cache, o and the residual, RMSNorm, SwiGLU feed-forward block and the residual; then the last norm and the
 * head. Everything rounds to dtype where the separate ops round. Position and place of the token as for
 * gqa_attention_decode; where cache_seqlens[b] is negative or no less than the capacity, row b becomes NaN and its
 * caches stay as they are. CUDA serves 1 ... 8 rows of float16 or bfloat16 on sm_90; the CPU twin, alone of all
 * functions, allocates: memory for one row's activations, for the time of the call.
 */
typedef struct gqa_decoder_step_params {
  uint32_t struct_size;
  int32_t dtype; /* of everything but the rotary tables */
  int32_t num_layers;
  const gqa_decoder_layer *layers; /* [num_layers], in host memory */
  const void *hidden;              /* [B, hidden] contiguous: embeddings of the tokens */
  const void *norm;                /* [hidden] */
  const void *head;                /* [vocabulary, hidden] */
  void *logits;                    /* [B, vocabulary] contiguous */
  gqa_index cache_seqlens;         /* [B] tokens before the append */
  gqa_index cache_leftpad;         /* [B] or absent */
  int64_t batch;
  int64_t hidden_size;
  int64_t intermediate;
  int64_t vocabulary;
  int64_t cache_capacity;
  int32_t num_q_heads;
  int32_t num_kv_heads;
  int32_t head_dim;
  float eps;
  float softmax_scale;
  gqa_rotary rotary; /* a table, or absent */
  void *workspace;   /* plan.workspace_size bytes, 16-byte aligned, need not be zeroed */
  int64_t workspace_size;
} gqa_decoder_step_params;

/* -------------------------------------------------------------------------------------------- functions -- */

#define GQA_DECLARE_OP(op, params)                                                         \
  GQA_API gqa_status gqa_##op##_cuda(const params *p, struct CUstream_st *stream);         \
  GQA_API gqa_status gqa_##op##_cpu(const params *p, int64_t first_row, int64_t last_row); \
  GQA_API int64_t gqa_##op##_rows(const params *p);                                        \
  GQA_API gqa_status gqa_##op##_plan(const params *p, const gqa_device *device, gqa_plan *plan)

GQA_DECLARE_OP(rmsnorm, gqa_rmsnorm_params);
GQA_DECLARE_OP(add_rmsnorm, gqa_add_rmsnorm_params);
GQA_DECLARE_OP(residual_add, gqa_residual_add_params);
GQA_DECLARE_OP(swiglu, gqa_swiglu_params);
GQA_DECLARE_OP(swiglu_ffn, gqa_swiglu_ffn_params);
GQA_DECLARE_OP(linear, gqa_linear_params);
GQA_DECLARE_OP(rope, gqa_rope_params);
GQA_DECLARE_OP(qk_rmsnorm_rope, gqa_qk_rmsnorm_rope_params);
GQA_DECLARE_OP(kv_cache_append, gqa_kv_cache_append_params);
GQA_DECLARE_OP(attention_prefill, gqa_attention_prefill_params);
GQA_DECLARE_OP(attention_decode, gqa_attention_decode_params);
GQA_DECLARE_OP(merge_attention_states, gqa_merge_attention_states_params);
GQA_DECLARE_OP(sample, gqa_sample_params);
GQA_DECLARE_OP(decoder_step, gqa_decoder_step_params);

/* Bytes of workspace the CUDA launcher needs for these params on this device. */
GQA_API int64_t gqa_attention_prefill_workspace_size(const gqa_attention_prefill_params *p, const gqa_device *device);
GQA_API int64_t gqa_attention_decode_workspace_size(const gqa_attention_decode_params *p, const gqa_device *device);

/* A sentence for a status, never NULL. */
GQA_API const char *gqa_status_string(gqa_status status);
/* The CUDA runtime's words for the calling thread's last GQA_STATUS_CUDA_ERROR, or "". */
GQA_API const char *gqa_last_cuda_error(void);
GQA_API const char *gqa_version(void);
/* "80 90a ptx80", or "" without CUDA. */
GQA_API const char *gqa_cuda_archs(void);
/* The properties of the current CUDA device. */
GQA_API gqa_status gqa_current_device(gqa_device *device);

/* Called before each launch, on the launching thread; NULL turns it off. The launch is valid during the call. */
typedef void (*gqa_launch_log)(void *user, const gqa_launch *launch);
GQA_API void gqa_set_launch_log(gqa_launch_log log, void *user);

/* Internal, for tests: which kernels plans choose from. 0: all, 1: portable ones. */
GQA_API void gqa_set_kernel_override(int32_t family);

#ifdef __cplusplus
}
#endif
#endif
