//! Grouped-query attention over a KV cache, by libgqa_kernels.
//!
//! [`Attention`] holds the sizes of one layer. [`Attention::prefill`] and [`Attention::decode`] borrow the new tokens,
//! append their keys and values to a [`KvCache`] and write the output; every size is checked before the library is
//! called, and whatever it refuses is an [`Error`]. [`cuda`] has the same two calls on a device, on a stream of yours.

pub mod cuda;
pub mod ffi;

use std::ffi::{c_void, CStr};
use std::fmt;
use std::thread;

use ffi::AttentionParams;

/// What the library computes in; sums are float32 whatever the element.
///
/// # Safety
/// `DTYPE` is the header's number of a dtype with the size and the layout of the type.
pub unsafe trait Element: Copy + Default + Send + Sync {
    const DTYPE: i32;
}

/// The bits of an IEEE half.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct F16(pub u16);

/// The upper half of a float32.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Bf16(pub u16);

// SAFETY: GQA_DTYPE_FLOAT32, GQA_DTYPE_FLOAT16 and GQA_DTYPE_BFLOAT16.
unsafe impl Element for f32 {
    const DTYPE: i32 = 0;
}
unsafe impl Element for F16 {
    const DTYPE: i32 = 1;
}
unsafe impl Element for Bf16 {
    const DTYPE: i32 = 2;
}

/// The sizes of one attention layer and of its cache.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    pub batch: usize,
    pub num_q_heads: usize,
    pub num_kv_heads: usize,
    pub head_dim: usize,
    /// Tokens that a sequence may have: rows of the cache.
    pub max_seq_len: usize,
    /// Of prefill; decode is always causal.
    pub causal: bool,
    /// `None` is 1 / sqrt(head_dim).
    pub softmax_scale: Option<f32>,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Error {
    /// An argument has the wrong number of elements, or a size is out of range.
    Size { what: &'static str, wanted: String, got: usize },
    /// The library refused.
    Status { call: &'static str, status: i32, message: String },
    /// The CUDA driver refused, or there is none.
    Driver { call: &'static str, code: i32 },
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Size { what, wanted, got } => write!(f, "{what} must be {wanted}, got {got}"),
            Error::Status { call, status, message } => write!(f, "{call}: {message} (status {status})"),
            Error::Driver { call, code } => write!(f, "the CUDA driver's {call} returned {code}"),
        }
    }
}

impl std::error::Error for Error {}

pub type Result<T> = std::result::Result<T, Error>;

pub(crate) fn check(call: &'static str, status: i32) -> Result<()> {
    if status == ffi::STATUS_OK {
        return Ok(());
    }
    // SAFETY: both return strings that live as long as the library, or the thread.
    let text = unsafe {
        CStr::from_ptr(if status == ffi::STATUS_CUDA_ERROR {
            ffi::gqa_last_cuda_error()
        } else {
            ffi::gqa_status_string(status)
        })
    };
    Err(Error::Status { call, status, message: text.to_string_lossy().into_owned() })
}

/// New tokens of every sequence, contiguous: q and out `[batch, tokens, num_q_heads, head_dim]`, k and v
/// `[batch, tokens, num_kv_heads, head_dim]`.
pub struct Tokens<'a, T> {
    pub q: &'a [T],
    pub k: &'a [T],
    pub v: &'a [T],
    pub out: &'a mut [T],
}

/// Keys and values `[batch, max_seq_len, num_kv_heads, head_dim]` of one layer, and how many rows of each are filled.
pub struct KvCache<T> {
    k: Vec<T>,
    v: Vec<T>,
    lengths: Vec<i32>,
}

impl<T> KvCache<T> {
    pub fn lengths(&self) -> &[i32] {
        &self.lengths
    }
}

/// Where the tensors of a call lie, on the host or on a device.
pub(crate) struct Pointers {
    pub q: *const c_void,
    pub k: *const c_void,
    pub v: *const c_void,
    pub out: *mut c_void,
    pub k_cache: *mut c_void,
    pub v_cache: *mut c_void,
    pub lengths: *const c_void,
}

#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Op {
    Prefill,
    Decode,
}

/// One attention layer. Copies of its [`Config`] are all it holds, so it can be shared between threads.
#[derive(Clone, Debug)]
pub struct Attention {
    config: Config,
}

impl Attention {
    pub const MAX_DECODE_TOKENS: usize = 16;

    pub fn new(config: Config) -> Result<Self> {
        let c = &config;
        for (what, size) in [
            ("batch", c.batch),
            ("num_q_heads", c.num_q_heads),
            ("num_kv_heads", c.num_kv_heads),
            ("head_dim", c.head_dim),
            ("max_seq_len", c.max_seq_len),
        ] {
            if size == 0 || size > i32::MAX as usize {
                return Err(Error::Size { what, wanted: "from 1 to 2^31 - 1".into(), got: size });
            }
        }
        if c.num_q_heads % c.num_kv_heads != 0 {
            let wanted = format!("a multiple of num_kv_heads ({})", c.num_kv_heads);
            return Err(Error::Size { what: "num_q_heads", wanted, got: c.num_q_heads });
        }
        if c.head_dim % 8 != 0 || c.head_dim > 256 {
            return Err(Error::Size { what: "head_dim", wanted: "a multiple of 8 up to 256".into(), got: c.head_dim });
        }
        Ok(Self { config })
    }

    pub fn config(&self) -> &Config {
        &self.config
    }

    pub(crate) fn cache_len(&self) -> usize {
        let c = &self.config;
        c.batch * c.max_seq_len * c.num_kv_heads * c.head_dim
    }

    pub fn new_cache<T: Element>(&self) -> KvCache<T> {
        let rows = vec![T::default(); self.cache_len()];
        KvCache { k: rows.clone(), v: rows, lengths: vec![0; self.config.batch] }
    }

    /// Appends a prompt, or a chunk of one, and attends to all of the cache.
    pub fn prefill<T: Element>(&self, tokens: Tokens<'_, T>, cache: &mut KvCache<T>) -> Result<()> {
        self.run(Op::Prefill, tokens, cache)
    }

    /// Appends up to 16 tokens a sequence and attends to all of the cache.
    pub fn decode<T: Element>(&self, tokens: Tokens<'_, T>, cache: &mut KvCache<T>) -> Result<()> {
        self.run(Op::Decode, tokens, cache)
    }

    fn run<T: Element>(&self, op: Op, tokens: Tokens<'_, T>, cache: &mut KvCache<T>) -> Result<()> {
        let sizes = [tokens.q.len(), tokens.k.len(), tokens.v.len(), tokens.out.len(), cache.k.len()];
        let count = self.checked_count(op, sizes, &cache.lengths)?;
        let params = self.params::<T>(
            op,
            count,
            &Pointers {
                q: tokens.q.as_ptr().cast(),
                k: tokens.k.as_ptr().cast(),
                v: tokens.v.as_ptr().cast(),
                out: tokens.out.as_mut_ptr().cast(),
                k_cache: cache.k.as_mut_ptr().cast(),
                v_cache: cache.v.as_mut_ptr().cast(),
                lengths: cache.lengths.as_ptr().cast(),
            },
        );
        run_on_threads(op, params)?;
        cache.lengths.iter_mut().for_each(|length| *length += count as i32);
        Ok(())
    }

    /// Tokens of a call whose q, k, v, out and k_cache have so many elements; an error where they do not fit.
    pub(crate) fn checked_count(&self, op: Op, sizes: [usize; 5], lengths: &[i32]) -> Result<usize> {
        let c = &self.config;
        let (q_row, kv_row) = (c.batch * c.num_q_heads * c.head_dim, c.batch * c.num_kv_heads * c.head_dim);
        let [q, k, v, out, k_cache] = sizes;
        let count = q / q_row;
        let used = lengths.iter().copied().max().unwrap_or(0) as usize;
        let room = c.max_seq_len.saturating_sub(used);
        let most = if op == Op::Decode { room.min(Self::MAX_DECODE_TOKENS) } else { room };
        if count == 0 || count > most {
            return Err(Error::Size { what: "tokens", wanted: format!("from 1 to {most}"), got: count });
        }
        for (what, wanted, got) in [
            ("q.len()", count * q_row, q),
            ("k.len()", count * kv_row, k),
            ("v.len()", count * kv_row, v),
            ("out.len()", count * q_row, out),
            ("the cache's elements", self.cache_len(), k_cache),
            ("the cache's batch", c.batch, lengths.len()),
        ] {
            if got != wanted {
                return Err(Error::Size { what, wanted: wanted.to_string(), got });
            }
        }
        Ok(count)
    }

    pub(crate) fn params<T: Element>(&self, op: Op, count: usize, at: &Pointers) -> AttentionParams {
        let c = &self.config;
        let stride = |rows: usize, heads: usize| {
            [(rows * heads * c.head_dim) as i64, (heads * c.head_dim) as i64, c.head_dim as i64]
        };
        let mut p = AttentionParams::zeroed();
        p.struct_size = std::mem::size_of::<AttentionParams>() as u32;
        p.dtype = T::DTYPE;
        (p.q, p.k, p.v, p.out) = (at.q, at.k, at.v, at.out);
        (p.k_cache, p.v_cache) = (at.k_cache, at.v_cache);
        p.cache_seqlens = ffi::Index { data: at.lengths, dtype: 3, stride: [1, 0] }; // int32
        p.batch = c.batch as i64;
        (p.seqlen_q, p.seqlen_k) = (count as i64, count as i64);
        p.num_q_heads = c.num_q_heads as i32;
        p.num_kv_heads = c.num_kv_heads as i32;
        p.head_dim = c.head_dim as i32;
        p.causal = (c.causal || op == Op::Decode) as i32;
        (p.window_left, p.window_right) = (-1, -1);
        p.cache_capacity = c.max_seq_len as i64;
        (p.q_stride, p.out_stride) = (stride(count, c.num_q_heads), stride(count, c.num_q_heads));
        (p.k_stride, p.v_stride) = (stride(count, c.num_kv_heads), stride(count, c.num_kv_heads));
        p.k_cache_stride = stride(c.max_seq_len, c.num_kv_heads);
        p.v_cache_stride = p.k_cache_stride;
        p.softmax_scale = c.softmax_scale.unwrap_or(1.0 / (c.head_dim as f32).sqrt());
        p
    }
}

/// Params that threads read together.
struct Shared(AttentionParams);

// SAFETY: ranges of rows write disjoint memory, which the header promises, and all of it outlives the threads.
unsafe impl Sync for Shared {}

/// The library computes a range of rows on the calling thread; how many threads there are is the caller's choice.
fn run_on_threads(op: Op, params: AttentionParams) -> Result<()> {
    let shared = Shared(params);
    let range = |first: i64, last: i64| {
        let p: &Shared = &shared;
        // SAFETY: every pointer is valid for the sizes and strides in the params (`checked_count`), and `first ..
        // last` lies within the rows of the call.
        match op {
            Op::Prefill => check("prefill", unsafe { ffi::gqa_attention_prefill_cpu(&p.0, first, last) }),
            Op::Decode => check("decode", unsafe { ffi::gqa_attention_decode_cpu(&p.0, first, last) }),
        }
    };
    // SAFETY: as above.
    let rows = match op {
        Op::Prefill => unsafe { ffi::gqa_attention_prefill_rows(&shared.0) },
        Op::Decode => unsafe { ffi::gqa_attention_decode_rows(&shared.0) },
    };
    let threads = (thread::available_parallelism().map_or(1, |n| n.get()) as i64).clamp(1, rows.max(1));
    thread::scope(|scope| {
        let workers: Vec<_> =
            (0..threads).map(|i| scope.spawn(move || range(rows * i / threads, rows * (i + 1) / threads))).collect();
        workers.into_iter().try_for_each(|worker| worker.join().expect("the library does not panic"))
    })
}
