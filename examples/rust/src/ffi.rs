//! `gqa_kernels.h` as Rust sees it: the structs of attention and of the launch log, field by field, and the functions.

use std::ffi::{c_char, c_void};

/// Name, offset and size of each field.
pub type Layout = &'static [(&'static str, usize, usize)];

/// A struct of the header, its name there, and its layout as this compiler sees it.
macro_rules! c_struct {
    ($(#[$doc:meta])* $name:ident = $c_name:literal { $($field:ident: $kind:ty,)* }) => {
        $(#[$doc])*
        #[repr(C)]
        #[derive(Clone, Copy)]
        pub struct $name { $(pub $field: $kind,)* }

        impl $name {
            pub const C_NAME: &'static str = $c_name;
            pub const LAYOUT: Layout =
                &[$((stringify!($field), std::mem::offset_of!($name, $field), std::mem::size_of::<$kind>()),)*];

            /// All bytes zero: what is zero is absent.
            pub fn zeroed() -> Self {
                // SAFETY: every field is a number, a nullable pointer, or an array or struct of them.
                unsafe { std::mem::zeroed() }
            }
        }
    };
}

c_struct! {
    /// An integer tensor with up to two dimensions.
    Index = "gqa_index" {
        data: *const c_void,
        dtype: i32,
        stride: [i64; 2],
    }
}

c_struct! {
    /// Rotary embedding tables.
    Rotary = "gqa_rotary" {
        cos: *const c_void,
        sin: *const c_void,
        dtype: i32,
        dim: i32,
        gathered: i32,
        interleaved: i32,
        num_positions: i64,
        stride_batch: i64,
        stride_row: i64,
        positions: Index,
    }
}

c_struct! {
    /// What quantised caches hold; zeroed: caches are not quantised.
    KvQuantization = "gqa_kv_quantization" {
        dtype: i32,
        k_scale: *const f32,
        v_scale: *const f32,
        k_scale_stride: i64,
        v_scale_stride: i64,
    }
}

c_struct! {
    /// Prefill and decode take the same params.
    AttentionParams = "gqa_attention_params" {
        struct_size: u32,
        dtype: i32,
        q: *const c_void,
        k: *const c_void,
        v: *const c_void,
        k_cache: *mut c_void,
        v_cache: *mut c_void,
        out: *mut c_void,
        lse: *mut f32,
        sinks: *const c_void,
        sinks_dtype: i32,
        cache_seqlens: Index,
        cu_seqlens_q: Index,
        cu_seqlens_k: Index,
        cache_leftpad: Index,
        block_table: Index,
        batch: i64,
        seqlen_q: i64,
        seqlen_k: i64,
        total_q: i64,
        total_k: i64,
        num_q_heads: i32,
        num_kv_heads: i32,
        head_dim: i32,
        causal: i32,
        window_left: i32,
        window_right: i32,
        cache_capacity: i64,
        num_pages: i64,
        page_size: i64,
        q_stride: [i64; 3],
        k_stride: [i64; 3],
        v_stride: [i64; 3],
        k_cache_stride: [i64; 3],
        v_cache_stride: [i64; 3],
        out_stride: [i64; 3],
        rotary: Rotary,
        softmax_scale: f32,
        softcap: f32,
        num_splits: i32,
        batch_invariant: i32,
        workspace: *mut c_void,
        workspace_size: i64,
        quantization: KvQuantization,
        static_prefix: i32,
    }
}

c_struct! {
    /// The properties of a device that plans look at.
    Device = "gqa_device" {
        compute_capability: i32,
        num_sms: i32,
        max_shared_memory: i32,
        l2_size: i32,
    }
}

c_struct! {
    /// One kernel launch.
    Launch = "gqa_launch" {
        op: *const c_char,
        kernel: *const c_char,
        dtype: *const c_char,
        grid: [i32; 3],
        block: [i32; 3],
        shared_memory: i32,
        num_splits: i32,
        variant: i32,
    }
}

c_struct! {
    /// Which kernels a call would launch, and why these.
    Plan = "gqa_plan" {
        num_launches: i32,
        launches: [Launch; 4],
        workspace_size: i64,
        reason: *const c_char,
    }
}

/// A CUDA stream; only pointers to it exist.
#[repr(C)]
pub struct CudaStream {
    _opaque: [u8; 0],
}

pub const STATUS_OK: i32 = 0;
pub const STATUS_CUDA_ERROR: i32 = 7;

extern "C" {
    pub fn gqa_attention_prefill_cpu(params: *const AttentionParams, first_row: i64, last_row: i64) -> i32;
    pub fn gqa_attention_prefill_cuda(params: *const AttentionParams, stream: *mut CudaStream) -> i32;
    pub fn gqa_attention_prefill_rows(params: *const AttentionParams) -> i64;
    pub fn gqa_attention_prefill_workspace_size(params: *const AttentionParams, device: *const Device) -> i64;
    pub fn gqa_attention_prefill_plan(params: *const AttentionParams, device: *const Device, plan: *mut Plan) -> i32;
    pub fn gqa_attention_decode_cpu(params: *const AttentionParams, first_row: i64, last_row: i64) -> i32;
    pub fn gqa_attention_decode_cuda(params: *const AttentionParams, stream: *mut CudaStream) -> i32;
    pub fn gqa_attention_decode_rows(params: *const AttentionParams) -> i64;
    pub fn gqa_attention_decode_workspace_size(params: *const AttentionParams, device: *const Device) -> i64;
    pub fn gqa_attention_decode_plan(params: *const AttentionParams, device: *const Device, plan: *mut Plan) -> i32;
    pub fn gqa_status_string(status: i32) -> *const c_char;
    pub fn gqa_last_cuda_error() -> *const c_char;
    pub fn gqa_cuda_archs() -> *const c_char;
    pub fn gqa_current_device(device: *mut Device) -> i32;
}
