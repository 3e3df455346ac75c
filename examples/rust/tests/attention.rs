//! Prefill and decode against a plain loop, on the CPU and, where there is one, on a CUDA device.

use gqa_attention::cuda::{Cuda, DeviceCache, DeviceTokens};
use gqa_attention::{Attention, Bf16, Config, Element, Error, Tokens};

const PROMPT: usize = 33;
const STEPS: usize = 4;

fn config() -> Config {
    Config {
        batch: 2,
        num_q_heads: 6,
        num_kv_heads: 2,
        head_dim: 64,
        max_seq_len: 64,
        causal: true,
        softmax_scale: None,
    }
}

/// Numbers from -1 to 1, the same on every machine.
fn random(len: usize, seed: u32) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(1664525).wrapping_add(1013904223);
        (state >> 8) as f32 / 8388608.0 - 1.0
    };
    (0..len).map(|_| next()).collect()
}

/// q, k, v of all tokens of one sequence after the other, `[batch, tokens, heads, head_dim]`.
struct Data {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
}

impl Data {
    fn new(c: &Config, tokens: usize) -> Self {
        let (q, kv) = (c.batch * tokens * c.num_q_heads * c.head_dim, c.batch * tokens * c.num_kv_heads * c.head_dim);
        Self { q: random(q, 1), k: random(kv, 2), v: random(kv, 3) }
    }
}

/// The tokens `first .. first + count` of each sequence.
fn cut<T: Copy>(all: &[T], batch: usize, tokens: usize, first: usize, count: usize) -> Vec<T> {
    let row = all.len() / batch / tokens;
    let part = |b: usize| &all[(b * tokens + first) * row..(b * tokens + first + count) * row];
    (0..batch).flat_map(part).copied().collect()
}

/// Puts what `cut` took back.
fn paste<T: Copy>(all: &mut [T], part: &[T], batch: usize, tokens: usize, first: usize, count: usize) {
    let row = all.len() / batch / tokens;
    for b in 0..batch {
        let to = (b * tokens + first) * row;
        all[to..to + count * row].copy_from_slice(&part[b * count * row..(b + 1) * count * row]);
    }
}

/// softmax(q k^T * scale) v in f64, and the error that f32 may have.
fn reference(c: &Config, data: &Data, tokens: usize) -> (Vec<f64>, f64) {
    let at = |heads: usize, b: usize, t: usize, h: usize| ((b * tokens + t) * heads + h) * c.head_dim;
    let scale = f64::from(c.softmax_scale.unwrap_or(1.0 / (c.head_dim as f32).sqrt()));
    let (mut out, mut top_score, mut top_value) = (vec![0.0; data.q.len()], 0f64, 0f64);
    for b in 0..c.batch {
        for h in 0..c.num_q_heads {
            let kv_head = h / (c.num_q_heads / c.num_kv_heads);
            for t in 0..tokens {
                let q = &data.q[at(c.num_q_heads, b, t, h)..][..c.head_dim];
                let keys = if c.causal { t + 1 } else { tokens };
                let score = |s: usize| {
                    let k = &data.k[at(c.num_kv_heads, b, s, kv_head)..][..c.head_dim];
                    q.iter().zip(k).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>() * scale
                };
                let scores: Vec<f64> = (0..keys).map(score).collect();
                let sum: f64 = scores.iter().map(|s| s.exp()).sum();
                let to = at(c.num_q_heads, b, t, h);
                for (s, score) in scores.iter().enumerate() {
                    top_score = top_score.max(score.abs());
                    for d in 0..c.head_dim {
                        let value = f64::from(data.v[at(c.num_kv_heads, b, s, kv_head) + d]);
                        top_value = top_value.max(value.abs());
                        out[to + d] += score.exp() / sum * value;
                    }
                }
            }
        }
    }
    (out, 8.0 * f64::from(f32::EPSILON) * (1.0 + top_score) * top_value)
}

fn largest_error(out: &[f32], expected: &[f64]) -> f64 {
    let difference = |(a, b): (&f32, &f64)| (f64::from(*a) - b).abs();
    out.iter().zip(expected).map(difference).fold(0.0, |most, d| if d.is_nan() { d } else { d.max(most) })
}

/// A prompt, then one token at a time.
fn calls() -> Vec<(usize, usize)> {
    std::iter::once((0, PROMPT)).chain((PROMPT..PROMPT + STEPS).map(|first| (first, 1))).collect()
}

fn run_cpu<T: Element>(c: &Config, q: &[T], k: &[T], v: &[T]) -> Vec<T> {
    let attention = Attention::new(c.clone()).unwrap();
    let mut cache = attention.new_cache::<T>();
    let (mut out, tokens) = (vec![T::default(); q.len()], PROMPT + STEPS);
    for (first, count) in calls() {
        let (q, k, v) = (
            cut(q, c.batch, tokens, first, count),
            cut(k, c.batch, tokens, first, count),
            cut(v, c.batch, tokens, first, count),
        );
        let mut part = vec![T::default(); q.len()];
        let step = Tokens { q: &q, k: &k, v: &v, out: &mut part };
        if first == 0 { attention.prefill(step, &mut cache) } else { attention.decode(step, &mut cache) }.unwrap();
        paste(&mut out, &part, c.batch, tokens, first, count);
    }
    assert_eq!(cache.lengths(), vec![tokens as i32; c.batch]);
    out
}

fn judge(label: &str, out: &[f32], expected: &[f64], allowed: f64) {
    let error = largest_error(out, expected);
    println!(
        "{label}: prefill of {PROMPT} tokens, {STEPS} decode steps, largest error {error:.1e}, allowed {allowed:.1e}"
    );
    assert!(error <= allowed, "{label}: {error:.1e} > {allowed:.1e}");
}

#[test]
fn cpu_equals_a_plain_loop() {
    for (num_q_heads, num_kv_heads, head_dim, scale) in [(6, 2, 64, None), (4, 4, 96, Some(0.3)), (7, 1, 128, None)] {
        let c = Config { num_q_heads, num_kv_heads, head_dim, softmax_scale: scale, ..config() };
        let data = Data::new(&c, PROMPT + STEPS);
        let (expected, allowed) = reference(&c, &data, PROMPT + STEPS);
        judge(
            &format!("cpu {num_q_heads}:{num_kv_heads} D{head_dim}"),
            &run_cpu(&c, &data.q, &data.k, &data.v),
            &expected,
            allowed,
        );
    }
}

#[test]
fn full_attention_sees_all_keys() {
    let c = Config { causal: false, ..config() };
    let data = Data::new(&c, PROMPT);
    let (expected, allowed) = reference(&c, &data, PROMPT);
    let attention = Attention::new(c).unwrap();
    let mut out = vec![0.0; data.q.len()];
    let tokens = Tokens { q: &data.q, k: &data.k, v: &data.v, out: &mut out };
    attention.prefill(tokens, &mut attention.new_cache()).unwrap();
    judge("cpu full", &out, &expected, allowed);
}

/// One key: its value is the output, in bfloat16 to the bit.
#[test]
fn bfloat16_of_one_token_is_its_value() {
    let c = config();
    let attention = Attention::new(c.clone()).unwrap();
    let bf16 = |values: Vec<f32>| values.iter().map(|x| Bf16((x.to_bits() >> 16) as u16)).collect::<Vec<_>>();
    let data = Data::new(&c, 1);
    let (q, k, v) = (bf16(data.q), bf16(data.k), bf16(data.v));
    let mut out = vec![Bf16(0); q.len()];
    let tokens = Tokens { q: &q, k: &k, v: &v, out: &mut out };
    attention.prefill(tokens, &mut attention.new_cache()).unwrap();
    for b in 0..c.batch {
        for h in 0..c.num_q_heads {
            let (at, from) = ((b * c.num_q_heads + h) * c.head_dim, (b * c.num_kv_heads + h / 3) * c.head_dim);
            assert_eq!(out[at..at + c.head_dim], v[from..from + c.head_dim]);
        }
    }
}

#[test]
fn wrong_sizes_are_errors() {
    let size = |config| Attention::new(config).unwrap_err().to_string();
    assert_eq!(
        size(Config { num_q_heads: 5, ..config() }),
        "num_q_heads must be a multiple of num_kv_heads (2), got 5"
    );
    assert_eq!(size(Config { head_dim: 60, ..config() }), "head_dim must be a multiple of 8 up to 256, got 60");
    assert_eq!(size(Config { batch: 0, ..config() }), "batch must be from 1 to 2^31 - 1, got 0");

    let c = config();
    let attention = Attention::new(c.clone()).unwrap();
    let mut cache = attention.new_cache();
    let data = Data::new(&c, 17);
    let mut out = vec![0.0; data.q.len()];
    let short = Tokens { q: &data.q, k: &data.k[1..], v: &data.v, out: &mut out };
    assert_eq!(attention.prefill(short, &mut cache).unwrap_err().to_string(), "k.len() must be 4352, got 4351");
    let long = Tokens { q: &data.q, k: &data.k, v: &data.v, out: &mut out };
    assert_eq!(attention.decode(long, &mut cache).unwrap_err().to_string(), "tokens must be from 1 to 16, got 17");
    for filled in [17, 34, 51] {
        let tokens = Tokens { q: &data.q, k: &data.k, v: &data.v, out: &mut out };
        attention.prefill(tokens, &mut cache).unwrap();
        assert_eq!(cache.lengths(), [filled, filled]);
    }
    let past = Tokens { q: &data.q, k: &data.k, v: &data.v, out: &mut out };
    let error = attention.prefill(past, &mut cache).unwrap_err();
    assert_eq!(error, Error::Size { what: "tokens", wanted: "from 1 to 13".into(), got: 17 });

    let other = Attention::new(Config { batch: 1, max_seq_len: 128, ..config() }).unwrap();
    let tokens = Tokens { q: &data.q, k: &data.k, v: &data.v, out: &mut out };
    let error = attention.prefill(tokens, &mut other.new_cache()).unwrap_err();
    assert_eq!(error.to_string(), "the cache's batch must be 2, got 1");
}

#[test]
fn cuda_equals_a_plain_loop() {
    let cuda = match Cuda::open() {
        Ok(cuda) => cuda,
        Err(error) => return println!("cuda: skipped, {error}"),
    };
    let c = config();
    let (data, tokens) = (Data::new(&c, PROMPT + STEPS), PROMPT + STEPS);
    let (expected, allowed) = reference(&c, &data, tokens);
    let attention = Attention::new(c.clone()).unwrap();
    let stream = cuda.stream().unwrap();
    let mut cache = DeviceCache::new(&attention, &cuda).unwrap();
    let mut out = vec![f32::NAN; data.q.len()];
    for (first, count) in calls() {
        let on_device = |all: &[f32]| {
            let part = cut(all, c.batch, tokens, first, count);
            let mut buffer = cuda.buffer(part.len()).unwrap();
            buffer.upload(&part, &stream).unwrap();
            buffer
        };
        let (q, k, v) = (on_device(&data.q), on_device(&data.k), on_device(&data.v));
        let mut part = vec![f32::NAN; c.batch * count * c.num_q_heads * c.head_dim];
        let mut result = cuda.buffer(part.len()).unwrap();
        let step = DeviceTokens { q: &q, k: &k, v: &v, out: &mut result };
        match first {
            0 => attention.prefill_cuda(step, &mut cache, &stream),
            _ => attention.decode_cuda(step, &mut cache, &stream),
        }
        .unwrap();
        result.download(&mut part, &stream).unwrap();
        paste(&mut out, &part, c.batch, tokens, first, count);
    }
    assert_eq!(cache.lengths(), vec![tokens as i32; c.batch]);
    judge("cuda", &out, &expected, allowed);
}
