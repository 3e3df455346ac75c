/* What every entry of gqa_kernels.h refuses, and with which status. Prints each failure; exits with 1 if any. */
#include <stdio.h>
#include <string.h>

#include "gqa_kernels.h"

#define B 2
#define S 3
#define HQ 4
#define HKV 2
#define D 8
#define CAPACITY 16

static float values[16 * 1024], results[4][16 * 1024];
static int64_t ids[16];
static int32_t lengths[B], words[400];
static const gqa_device h200 = {90, 132, 232448, 62914560};
static int failures = 0, checks = 0;

static void expect(const char *what, const char *label, gqa_status got, gqa_status want) {
  ++checks;
  if (got == want) return;
  ++failures;
  printf("%s, %s: status %d (%s), not %d\n", what, label, (int)got, gqa_status_string(got), (int)want);
}

/* The CUDA entry refuses before it looks for a GPU; without CUDA it says so. */
static gqa_status on_cuda(gqa_status status) { return gqa_cuda_archs()[0] == '\0' ? GQA_STATUS_NOT_BUILT : status; }

#define REFUSES(op, p, label, status)                                      \
  do {                                                                     \
    gqa_plan plan;                                                         \
    expect(#op "_cpu", label, gqa_##op##_cpu(p, 0, 1), status);            \
    expect(#op "_plan", label, gqa_##op##_plan(p, &h200, &plan), status);  \
    expect(#op "_cuda", label, gqa_##op##_cuda(p, NULL), on_cuda(status)); \
  } while (0)

#define WITH(op, change, status)      \
  do {                                \
    gqa_##op##_params p;              \
    fill_##op(&p);                    \
    p.change;                         \
    REFUSES(op, &p, #change, status); \
  } while (0)

#define WITHOUT(op, pointer) WITH(op, pointer = NULL, GQA_STATUS_NULL_POINTER)

#define ACCEPTS_AND_REFUSES(op)                                                                                      \
  do {                                                                                                               \
    gqa_plan plan;                                                                                                   \
    gqa_##op##_params p;                                                                                             \
    fill_##op(&p);                                                                                                   \
    expect(#op "_plan", "valid", gqa_##op##_plan(&p, &h200, &plan), GQA_STATUS_OK);                                  \
    expect(#op "_plan", "launches", plan.num_launches >= 1 ? GQA_STATUS_OK : GQA_STATUS_UNSUPPORTED, GQA_STATUS_OK); \
    expect(#op "_cpu", "valid", gqa_##op##_cpu(&p, 0, gqa_##op##_rows(&p)), GQA_STATUS_OK);                          \
    expect(#op "_cpu", "no rows", gqa_##op##_cpu(&p, 0, 0), GQA_STATUS_OK);                                          \
    REFUSES(op, NULL, "no params", GQA_STATUS_NULL_POINTER);                                                         \
    WITH(op, struct_size = (uint32_t)sizeof(p) - 8, GQA_STATUS_STRUCT_SIZE);                                         \
    WITH(op, struct_size = 0, GQA_STATUS_STRUCT_SIZE);                                                               \
    WITH(op, dtype = GQA_DTYPE_INT32, GQA_STATUS_UNSUPPORTED);                                                       \
    WITH(op, dtype = 99, GQA_STATUS_UNSUPPORTED);                                                                    \
  } while (0)

/* Quantised caches serve 16-bit types; scales belong to them. */
#define QUANTIZATION(op)                                                      \
  do {                                                                        \
    WITH(op, quantization.dtype = GQA_DTYPE_INT8, GQA_STATUS_UNSUPPORTED);    \
    WITH(op, quantization.dtype = GQA_DTYPE_FLOAT16, GQA_STATUS_UNSUPPORTED); \
    WITH(op, quantization.k_scale = values, GQA_STATUS_INVALID_ARGUMENT);     \
  } while (0)

#define START(p)                   \
  memset(p, 0, sizeof(*(p)));      \
  (p)->struct_size = sizeof(*(p)); \
  (p)->dtype = GQA_DTYPE_FLOAT32

#define ROWS(p)     \
  (p)->rows[0] = 1; \
  (p)->rows[1] = 3; \
  (p)->hidden = 64

static void fill_rmsnorm(gqa_rmsnorm_params *p) {
  START(p);
  ROWS(p);
  p->weight_dtype = GQA_DTYPE_FLOAT32;
  p->x = p->weight = values;
  p->out = results[0];
  p->x_stride[1] = p->out_stride[1] = 64;
  p->eps = 1e-6f;
}

static void fill_add_rmsnorm(gqa_add_rmsnorm_params *p) {
  START(p);
  ROWS(p);
  p->weight_dtype = GQA_DTYPE_FLOAT32;
  p->x = p->residual = p->weight = values;
  p->out = results[0];
  p->residual_out = results[1];
  p->x_stride[1] = p->residual_stride[1] = p->out_stride[1] = p->residual_out_stride[1] = 64;
  p->eps = 1e-6f;
}

static void fill_residual_add(gqa_residual_add_params *p) {
  START(p);
  ROWS(p);
  p->x = p->residual = values;
  p->out = results[0];
  p->x_stride[1] = p->residual_stride[1] = p->out_stride[1] = 64;
}

static void fill_swiglu(gqa_swiglu_params *p) {
  START(p);
  ROWS(p);
  p->gate = p->up = values;
  p->out = results[0];
  p->gate_stride[1] = p->up_stride[1] = p->out_stride[1] = 64;
}

static void fill_linear(gqa_linear_params *p) {
  START(p);
  p->dtype = GQA_DTYPE_FLOAT16;
  p->tokens = 3;
  p->in_features = p->out_features[0] = p->out_features[1] = 64;
  p->x = p->weights[0] = p->weights[1] = values;
  p->out = results[0];
  p->x_stride = p->weight_stride[0] = p->weight_stride[1] = 64;
  p->out_stride = 128;
}

static void fill_swiglu_ffn(gqa_swiglu_ffn_params *p) {
  START(p);
  p->dtype = GQA_DTYPE_FLOAT16;
  p->tokens = 3;
  p->hidden = p->intermediate = p->out_features = 64;
  p->x = p->w_gate = p->w_up = p->w_down = values;
  p->activation = results[0];
  p->out = results[1];
  p->x_stride = p->w_gate_stride = p->w_up_stride = p->w_down_stride = 64;
}

static void strides(int64_t *stride, int64_t rows, int64_t heads) {
  stride[0] = rows * heads * D;
  stride[1] = heads * D;
  stride[2] = D;
}

static void fill_rope(gqa_rope_params *p) {
  START(p);
  p->q = p->k = values;
  p->q_out = results[0];
  p->k_out = results[1];
  p->batch = B;
  p->seqlen = S;
  p->num_q_heads = HQ;
  p->num_kv_heads = HKV;
  p->head_dim = D;
  strides(p->q_stride, S, HQ);
  strides(p->q_out_stride, S, HQ);
  strides(p->k_stride, S, HKV);
  strides(p->k_out_stride, S, HKV);
  p->rotary.cos = p->rotary.sin = values;
  p->rotary.dim = D;
  p->rotary.num_positions = S;
  p->rotary.stride_row = D / 2;
}

static gqa_index cache_seqlens(void) {
  gqa_index index = {lengths, GQA_DTYPE_INT32, {1, 0}};
  return index;
}

static void fill_qk_rmsnorm_rope(gqa_qk_rmsnorm_rope_params *p) {
  START(p);
  p->weight_dtype = GQA_DTYPE_FLOAT32;
  p->q = p->k = p->q_weight = p->k_weight = values;
  p->q_out = results[0];
  p->k_out = results[1];
  p->batch = B;
  p->seqlen = S;
  p->num_q_heads = HQ;
  p->num_kv_heads = HKV;
  p->head_dim = D;
  strides(p->q_stride, S, HQ);
  strides(p->q_out_stride, S, HQ);
  strides(p->k_stride, S, HKV);
  strides(p->k_out_stride, S, HKV);
  p->rotary.cos = p->rotary.sin = values;
  p->rotary.dim = D;
  p->rotary.num_positions = S;
  p->rotary.stride_row = D / 2;
  p->eps = 1e-6f;
}

static void fill_kv_cache_append(gqa_kv_cache_append_params *p) {
  START(p);
  p->k = p->v = values;
  p->k_cache = results[0];
  p->v_cache = results[1];
  p->cache_seqlens = cache_seqlens();
  p->batch = B;
  p->seqlen = S;
  p->num_kv_heads = HKV;
  p->head_dim = D;
  p->cache_capacity = CAPACITY;
  strides(p->k_stride, S, HKV);
  strides(p->v_stride, S, HKV);
  strides(p->k_cache_stride, CAPACITY, HKV);
  strides(p->v_cache_stride, CAPACITY, HKV);
}

static void fill_attention_prefill(gqa_attention_prefill_params *p) {
  START(p);
  p->q = p->k = p->v = values;
  p->out = results[0];
  p->batch = B;
  p->seqlen_q = p->seqlen_k = S;
  p->num_q_heads = HQ;
  p->num_kv_heads = HKV;
  p->head_dim = D;
  p->causal = 1;
  p->window_left = p->window_right = -1;
  p->softmax_scale = 1.0f;
  strides(p->q_stride, S, HQ);
  strides(p->out_stride, S, HQ);
  strides(p->k_stride, S, HKV);
  strides(p->v_stride, S, HKV);
}

/* The CUDA entry's workspace: any non-null pointer, since every call here is refused. */
static void fill_attention_decode(gqa_attention_decode_params *p) {
  fill_attention_prefill(p);
  p->k_cache = results[1];
  p->v_cache = results[2];
  p->cache_seqlens = cache_seqlens();
  p->cache_capacity = CAPACITY;
  strides(p->k_cache_stride, CAPACITY, HKV);
  strides(p->v_cache_stride, CAPACITY, HKV);
  p->workspace = results[3];
  p->workspace_size = sizeof(results[3]);
}

static void fill_merge_attention_states(gqa_merge_attention_states_params *p) {
  START(p);
  p->outs = p->lses = values;
  p->out = results[0];
  p->lse = results[1];
  p->parts = 3;
  p->batch = B;
  p->seqlen_q = S;
  p->num_q_heads = HQ;
  p->head_dim = D;
}

static void fill_sample(gqa_sample_params *p) {
  START(p);
  p->logits = values;
  p->ids = ids;
  p->rows = 3;
  p->vocab = 100;
  p->logits_stride = 100;
  p->temperature = 1.0f;
  p->top_p = 1.0f;
  p->logit_bias = p->repetition_penalties = p->frequency_penalties = p->presence_penalties = values;
  p->logit_bias_dtype = GQA_DTYPE_FLOAT32;
  p->allowed_bitmask = p->token_counts = words;
  p->token_counts_stride = 100;
}

static gqa_decoder_layer layers[2];

/* Refusals alone are asked of the CUDA entry: nothing of this is device memory. */
static void fill_decoder_step(gqa_decoder_step_params *p) {
  int i;
  START(p);
  p->dtype = GQA_DTYPE_FLOAT16;
  for (i = 0; i < 2; ++i) {
    gqa_decoder_layer *layer = &layers[i];
    memset(layer, 0, sizeof(*layer));
    layer->q_proj = layer->k_proj = layer->v_proj = layer->o_proj = values;
    layer->gate_proj = layer->up_proj = layer->down_proj = values;
    layer->input_norm = layer->mlp_norm = values;
    layer->k_cache = results[1];
    layer->v_cache = results[2];
    layer->window_left = -1;
  }
  p->num_layers = 2;
  p->layers = layers;
  p->hidden = p->norm = p->head = values;
  p->logits = results[0];
  p->cache_seqlens = cache_seqlens();
  p->batch = B;
  p->hidden_size = p->intermediate = 32;
  p->vocabulary = 40;
  p->cache_capacity = CAPACITY;
  p->num_q_heads = HQ;
  p->num_kv_heads = HKV;
  p->head_dim = 64;
  p->eps = 1e-6f;
  p->softmax_scale = 1.0f;
}

static void count_launch(void *user, const gqa_launch *launch) {
  (void)launch;
  ++*(int *)user;
}

int main(void) {
  int launches = 0;
  gqa_device device;
  gqa_plan plan;
  gqa_set_launch_log(count_launch, &launches);

  ACCEPTS_AND_REFUSES(rmsnorm);
  WITHOUT(rmsnorm, x);
  WITHOUT(rmsnorm, weight);
  WITHOUT(rmsnorm, out);
  WITH(rmsnorm, hidden = 0, GQA_STATUS_INVALID_ARGUMENT);
  WITH(rmsnorm, rows[0] = -1, GQA_STATUS_INVALID_ARGUMENT);
  WITH(rmsnorm, weight_dtype = GQA_DTYPE_FLOAT16, GQA_STATUS_UNSUPPORTED);

  ACCEPTS_AND_REFUSES(add_rmsnorm);
  WITHOUT(add_rmsnorm, x);
  WITHOUT(add_rmsnorm, residual);
  WITHOUT(add_rmsnorm, weight);
  WITHOUT(add_rmsnorm, out);
  WITHOUT(add_rmsnorm, residual_out);

  ACCEPTS_AND_REFUSES(residual_add);
  WITHOUT(residual_add, x);
  WITHOUT(residual_add, residual);
  WITHOUT(residual_add, out);

  ACCEPTS_AND_REFUSES(swiglu);
  WITHOUT(swiglu, gate);
  WITHOUT(swiglu, up);
  WITHOUT(swiglu, out);

  ACCEPTS_AND_REFUSES(linear);
  WITHOUT(linear, x);
  WITHOUT(linear, weights[0]);
  WITHOUT(linear, weights[1]);
  WITHOUT(linear, out);
  WITH(linear, in_features = 0, GQA_STATUS_INVALID_ARGUMENT);
  WITH(linear, out_features[0] = 0, GQA_STATUS_INVALID_ARGUMENT);
  WITH(linear, out_features[2] = -1, GQA_STATUS_INVALID_ARGUMENT);
  WITH(linear, tokens = -1, GQA_STATUS_INVALID_ARGUMENT);

  ACCEPTS_AND_REFUSES(swiglu_ffn);
  WITHOUT(swiglu_ffn, x);
  WITHOUT(swiglu_ffn, w_gate);
  WITHOUT(swiglu_ffn, w_up);
  WITHOUT(swiglu_ffn, w_down);
  WITHOUT(swiglu_ffn, activation);
  WITHOUT(swiglu_ffn, out);
  WITH(swiglu_ffn, hidden = 0, GQA_STATUS_INVALID_ARGUMENT);
  WITH(swiglu_ffn, tokens = -1, GQA_STATUS_INVALID_ARGUMENT);
  WITH(swiglu_ffn, w_gate_scale = values, GQA_STATUS_INVALID_ARGUMENT);
  WITH(swiglu_ffn, w_up_scale = values, GQA_STATUS_INVALID_ARGUMENT);

  ACCEPTS_AND_REFUSES(rope);
  WITHOUT(rope, q);
  WITHOUT(rope, q_out);
  WITHOUT(rope, k_out);
  WITHOUT(rope, rotary.cos);
  WITHOUT(rope, rotary.sin);
  WITH(rope, rotary.dim = D + 2, GQA_STATUS_INVALID_ARGUMENT);

  ACCEPTS_AND_REFUSES(qk_rmsnorm_rope);
  WITHOUT(qk_rmsnorm_rope, q);
  WITHOUT(qk_rmsnorm_rope, k);
  WITHOUT(qk_rmsnorm_rope, q_weight);
  WITHOUT(qk_rmsnorm_rope, k_weight);
  WITHOUT(qk_rmsnorm_rope, q_out);
  WITHOUT(qk_rmsnorm_rope, k_out);
  WITHOUT(qk_rmsnorm_rope, rotary.sin);
  WITH(qk_rmsnorm_rope, weight_dtype = GQA_DTYPE_FLOAT16, GQA_STATUS_UNSUPPORTED);
  WITH(qk_rmsnorm_rope, rotary.dim = D + 2, GQA_STATUS_INVALID_ARGUMENT);

  ACCEPTS_AND_REFUSES(kv_cache_append);
  WITHOUT(kv_cache_append, k);
  WITHOUT(kv_cache_append, v);
  WITHOUT(kv_cache_append, k_cache);
  WITHOUT(kv_cache_append, v_cache);
  WITHOUT(kv_cache_append, cache_seqlens.data);
  QUANTIZATION(kv_cache_append);

  ACCEPTS_AND_REFUSES(attention_prefill);
  WITHOUT(attention_prefill, q);
  WITHOUT(attention_prefill, v);
  WITHOUT(attention_prefill, out);
  WITH(attention_prefill, num_kv_heads = 3, GQA_STATUS_INVALID_ARGUMENT);
  WITH(attention_prefill, num_kv_heads = 0, GQA_STATUS_INVALID_ARGUMENT);

  ACCEPTS_AND_REFUSES(attention_decode);
  WITHOUT(attention_decode, q);
  WITHOUT(attention_decode, v);
  WITHOUT(attention_decode, out);
  WITHOUT(attention_decode, k_cache);
  WITHOUT(attention_decode, v_cache);
  WITHOUT(attention_decode, cache_seqlens.data);
  QUANTIZATION(attention_decode);
  WITH(attention_decode, num_kv_heads = 3, GQA_STATUS_INVALID_ARGUMENT);

  ACCEPTS_AND_REFUSES(merge_attention_states);
  WITHOUT(merge_attention_states, outs);
  WITHOUT(merge_attention_states, lses);
  WITHOUT(merge_attention_states, out);
  WITHOUT(merge_attention_states, lse);

  ACCEPTS_AND_REFUSES(sample);
  WITHOUT(sample, logits);
  WITHOUT(sample, ids);
  WITHOUT(sample, token_counts);
  WITH(sample, vocab = 0, GQA_STATUS_INVALID_ARGUMENT);
  WITH(sample, logit_bias_dtype = GQA_DTYPE_FLOAT16, GQA_STATUS_UNSUPPORTED);
  WITH(sample, logit_bias_dtype = GQA_DTYPE_INT32, GQA_STATUS_UNSUPPORTED);

  ACCEPTS_AND_REFUSES(decoder_step);
  WITHOUT(decoder_step, layers);
  WITHOUT(decoder_step, hidden);
  WITHOUT(decoder_step, norm);
  WITHOUT(decoder_step, head);
  WITHOUT(decoder_step, logits);
  WITHOUT(decoder_step, cache_seqlens.data);
  WITH(decoder_step, num_layers = 0, GQA_STATUS_INVALID_ARGUMENT);
  WITH(decoder_step, batch = -1, GQA_STATUS_INVALID_ARGUMENT);
  WITH(decoder_step, hidden_size = 0, GQA_STATUS_INVALID_ARGUMENT);
  WITH(decoder_step, cache_capacity = 0, GQA_STATUS_INVALID_ARGUMENT);
  WITH(decoder_step, num_kv_heads = 3, GQA_STATUS_INVALID_ARGUMENT);
  WITH(decoder_step, head_dim = 12, GQA_STATUS_UNSUPPORTED);
  WITH(decoder_step, cache_seqlens.dtype = GQA_DTYPE_FLOAT16, GQA_STATUS_UNSUPPORTED);

  /* Nothing above may have launched. */
  expect("launch log", "refused calls launch nothing", launches == 0 ? GQA_STATUS_OK : GQA_STATUS_CUDA_ERROR,
         GQA_STATUS_OK);
  gqa_set_launch_log(NULL, NULL);

  {
    gqa_attention_decode_params p;
    fill_attention_decode(&p);
    p.batch = 1;
    p.cache_capacity = 1 << 20;
    expect("attention_decode_plan", "long cache", gqa_attention_decode_plan(&p, &h200, &plan), GQA_STATUS_OK);
    if (plan.workspace_size != gqa_attention_decode_workspace_size(&p, &h200)) {
      ++failures;
      printf("attention_decode: workspace_size is not the plan's\n");
    }
  }

  expect("current_device", "no place to write", gqa_current_device(NULL), on_cuda(GQA_STATUS_NULL_POINTER));
  if (gqa_cuda_archs()[0] == '\0') expect("current_device", "", gqa_current_device(&device), GQA_STATUS_NOT_BUILT);
  if (strcmp(gqa_version(), GQA_KERNELS_VERSION) != 0) {
    ++failures;
    printf("version: header %s, library %s\n", GQA_KERNELS_VERSION, gqa_version());
  }
  {
    int status;
    for (status = 0; status <= GQA_STATUS_CUDA_ERROR + 1; ++status) {
      const char *text = gqa_status_string((gqa_status)status);
      if (text != NULL && strlen(text) > 1) continue;
      ++failures;
      printf("status %d has no words\n", status);
    }
  }
  printf("%d checks, %d failures\n", checks, failures);
  return failures != 0;
}
