//! The same calls on a CUDA device. The driver is looked up at run time, so all of this builds and runs without one.

use std::ffi::{c_char, c_int, c_uint, c_void};
use std::marker::PhantomData;
use std::mem::{size_of, transmute_copy};
use std::ptr;

use crate::ffi::{self, CudaStream};
use crate::{check, Attention, Element, Error, Op, Pointers, Result};

extern "C" {
    fn dlopen(name: *const c_char, flags: c_int) -> *mut c_void;
    fn dlsym(library: *mut c_void, name: *const c_char) -> *mut c_void;
}

const RTLD_NOW: c_int = 2;

macro_rules! driver {
    ($($field:ident = $symbol:literal: fn($($kind:ty),*),)*) => {
        struct Driver { $($field: unsafe extern "C" fn($($kind),*) -> c_int,)* }

        impl Driver {
            fn open() -> Result<Self> {
                // SAFETY: a name with its zero; loading the driver has no precondition.
                let library = unsafe { dlopen(c"libcuda.so.1".as_ptr(), RTLD_NOW) };
                if library.is_null() {
                    return Err(Error::Driver { call: "libcuda.so.1", code: -1 });
                }
                Ok(Self { $($field: {
                    // SAFETY: `library` is open, and the symbol has the signature written beside it.
                    let symbol = unsafe { dlsym(library, concat!($symbol, "\0").as_ptr().cast()) };
                    if symbol.is_null() {
                        return Err(Error::Driver { call: $symbol, code: -1 });
                    }
                    unsafe { transmute_copy(&symbol) }
                },)* })
            }
        }
    };
}

driver! {
    init = "cuInit": fn(c_uint),
    device_get = "cuDeviceGet": fn(*mut c_int, c_int),
    context_retain = "cuDevicePrimaryCtxRetain": fn(*mut *mut c_void, c_int),
    context_set = "cuCtxSetCurrent": fn(*mut c_void),
    stream_create = "cuStreamCreate": fn(*mut *mut CudaStream, c_uint),
    stream_destroy = "cuStreamDestroy_v2": fn(*mut CudaStream),
    stream_wait = "cuStreamSynchronize": fn(*mut CudaStream),
    allocate = "cuMemAlloc_v2": fn(*mut u64, usize),
    release = "cuMemFree_v2": fn(u64),
    upload = "cuMemcpyHtoDAsync_v2": fn(u64, *const c_void, usize, *mut CudaStream),
    download = "cuMemcpyDtoHAsync_v2": fn(*mut c_void, u64, usize, *mut CudaStream),
}

fn must(call: &'static str, code: c_int) -> Result<()> {
    if code == 0 {
        Ok(())
    } else {
        Err(Error::Driver { call, code })
    }
}

/// The first device, current on the thread that opened it. Not `Send`: a CUDA call needs its device current.
pub struct Cuda {
    driver: Driver,
    properties: ffi::Device,
    _thread: PhantomData<*const ()>,
}

impl Cuda {
    /// An error where the library has no CUDA kernels, or the machine no driver or device.
    pub fn open() -> Result<Self> {
        let driver = Driver::open()?;
        let (mut device, mut context) = (0, ptr::null_mut());
        let mut properties = ffi::Device { compute_capability: 0, num_sms: 0, max_shared_memory: 0, l2_size: 0 };
        // SAFETY: each pointer is to a local of the type that the call writes.
        unsafe {
            must("cuInit", (driver.init)(0))?;
            must("cuDeviceGet", (driver.device_get)(&mut device, 0))?;
            must("cuDevicePrimaryCtxRetain", (driver.context_retain)(&mut context, device))?;
            must("cuCtxSetCurrent", (driver.context_set)(context))?;
            check("current_device", ffi::gqa_current_device(&mut properties))?;
        }
        Ok(Self { driver, properties, _thread: PhantomData })
    }

    pub fn stream(&self) -> Result<Stream<'_>> {
        let mut handle = ptr::null_mut();
        // SAFETY: writes one handle.
        must("cuStreamCreate", unsafe { (self.driver.stream_create)(&mut handle, 0) })?;
        Ok(Stream { cuda: self, handle })
    }

    /// Memory for `len` elements, its content undefined.
    pub fn buffer<T: Copy>(&self, len: usize) -> Result<Buffer<'_, T>> {
        let mut address = 0;
        // SAFETY: writes one address.
        must("cuMemAlloc", unsafe { (self.driver.allocate)(&mut address, (len * size_of::<T>()).max(1)) })?;
        Ok(Buffer { cuda: self, address, len, _element: PhantomData })
    }
}

/// The stream that work is queued on. Its calls return before the work is done; [`Stream::wait`] waits.
pub struct Stream<'c> {
    cuda: &'c Cuda,
    handle: *mut CudaStream,
}

impl Stream<'_> {
    pub fn wait(&self) -> Result<()> {
        // SAFETY: the handle lives as long as `self`.
        must("cuStreamSynchronize", unsafe { (self.cuda.driver.stream_wait)(self.handle) })
    }
}

impl Drop for Stream<'_> {
    fn drop(&mut self) {
        // SAFETY: created once, destroyed once; queued work still completes.
        unsafe { (self.cuda.driver.stream_destroy)(self.handle) };
    }
}

/// Device memory. Freed when dropped, after all work that was queued on the device.
pub struct Buffer<'c, T> {
    cuda: &'c Cuda,
    address: u64,
    len: usize,
    _element: PhantomData<T>,
}

impl<T: Copy> Buffer<'_, T> {
    pub fn upload(&mut self, from: &[T], stream: &Stream<'_>) -> Result<()> {
        self.check_len(from.len())?;
        let (bytes, data) = (std::mem::size_of_val(from), from.as_ptr().cast());
        // SAFETY: as many bytes on both sides; the driver has read pageable host memory when it returns.
        must("cuMemcpyHtoDAsync", unsafe { (self.cuda.driver.upload)(self.address, data, bytes, stream.handle) })
    }

    /// Waits for the stream.
    pub fn download(&self, to: &mut [T], stream: &Stream<'_>) -> Result<()> {
        self.check_len(to.len())?;
        let (bytes, data) = (std::mem::size_of_val(to), to.as_mut_ptr().cast());
        // SAFETY: as many bytes on both sides, and `to` is borrowed until the stream has arrived.
        must("cuMemcpyDtoHAsync", unsafe { (self.cuda.driver.download)(data, self.address, bytes, stream.handle) })?;
        stream.wait()
    }

    fn check_len(&self, got: usize) -> Result<()> {
        if got == self.len {
            return Ok(());
        }
        Err(Error::Size { what: "the host slice", wanted: self.len.to_string(), got })
    }

    fn pointer(&self) -> *mut c_void {
        self.address as *mut c_void
    }
}

impl<T> Drop for Buffer<'_, T> {
    fn drop(&mut self) {
        // SAFETY: allocated once, freed once; the driver waits for work that may use it.
        unsafe { (self.cuda.driver.release)(self.address) };
    }
}

/// [`crate::Tokens`] on the device.
pub struct DeviceTokens<'a, 'c, T> {
    pub q: &'a Buffer<'c, T>,
    pub k: &'a Buffer<'c, T>,
    pub v: &'a Buffer<'c, T>,
    pub out: &'a mut Buffer<'c, T>,
}

/// [`crate::KvCache`] on the device, with the workspace that calls on it use one after the other.
pub struct DeviceCache<'c, T> {
    k: Buffer<'c, T>,
    v: Buffer<'c, T>,
    lengths_on_device: Buffer<'c, i32>,
    lengths: Vec<i32>,
    workspace: Buffer<'c, u8>,
}

impl<'c, T: Element> DeviceCache<'c, T> {
    pub fn new(attention: &Attention, cuda: &'c Cuda) -> Result<Self> {
        let batch = attention.config().batch;
        Ok(Self {
            k: cuda.buffer(attention.cache_len())?,
            v: cuda.buffer(attention.cache_len())?,
            lengths_on_device: cuda.buffer(batch)?,
            lengths: vec![0; batch],
            workspace: cuda.buffer(0)?,
        })
    }

    pub fn lengths(&self) -> &[i32] {
        &self.lengths
    }
}

impl Attention {
    /// [`Attention::prefill`], queued on `stream`.
    pub fn prefill_cuda<'c, T: Element>(
        &self,
        tokens: DeviceTokens<'_, 'c, T>,
        cache: &mut DeviceCache<'c, T>,
        stream: &Stream<'c>,
    ) -> Result<()> {
        self.run_cuda(Op::Prefill, tokens, cache, stream)
    }

    /// [`Attention::decode`], queued on `stream`.
    pub fn decode_cuda<'c, T: Element>(
        &self,
        tokens: DeviceTokens<'_, 'c, T>,
        cache: &mut DeviceCache<'c, T>,
        stream: &Stream<'c>,
    ) -> Result<()> {
        self.run_cuda(Op::Decode, tokens, cache, stream)
    }

    fn run_cuda<'c, T: Element>(
        &self,
        op: Op,
        tokens: DeviceTokens<'_, 'c, T>,
        cache: &mut DeviceCache<'c, T>,
        stream: &Stream<'c>,
    ) -> Result<()> {
        let sizes = [tokens.q.len, tokens.k.len, tokens.v.len, tokens.out.len, cache.k.len];
        let count = self.checked_count(op, sizes, &cache.lengths)?;
        cache.lengths_on_device.upload(&cache.lengths, stream)?;
        let mut params = self.params::<T>(
            op,
            count,
            &Pointers {
                q: tokens.q.pointer(),
                k: tokens.k.pointer(),
                v: tokens.v.pointer(),
                out: tokens.out.pointer(),
                k_cache: cache.k.pointer(),
                v_cache: cache.v.pointer(),
                lengths: cache.lengths_on_device.pointer(),
            },
        );
        // SAFETY: every pointer is to device memory of the sizes and strides in the params (`checked_count`), and
        // whoever frees it waits for the work queued here.
        let bytes = match op {
            Op::Prefill => unsafe { ffi::gqa_attention_prefill_workspace_size(&params, &stream.cuda.properties) },
            Op::Decode => unsafe { ffi::gqa_attention_decode_workspace_size(&params, &stream.cuda.properties) },
        };
        if bytes > cache.workspace.len as i64 {
            cache.workspace = stream.cuda.buffer(bytes as usize)?;
        }
        params.workspace = cache.workspace.pointer();
        params.workspace_size = cache.workspace.len as i64;
        // SAFETY: as above.
        match op {
            Op::Prefill => check("prefill", unsafe { ffi::gqa_attention_prefill_cuda(&params, stream.handle) })?,
            Op::Decode => check("decode", unsafe { ffi::gqa_attention_decode_cuda(&params, stream.handle) })?,
        }
        cache.lengths.iter_mut().for_each(|length| *length += count as i32);
        Ok(())
    }
}
