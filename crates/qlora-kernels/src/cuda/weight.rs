//! A frozen weight on a GPU.

use std::fmt;
use std::ops::Range;
use std::sync::{Arc, OnceLock};

use candle_core::cuda_backend::cudarc::driver::result;

use super::buffer::Buffer;
use super::ffi;
use super::gpu::{Gpu, cuda_error};
use super::int_weight::DeviceInt;
use super::travel::{DeviceRing, PieceMemory};
use super::upload::{Source, Uploader};
use super::view::{CudaView, CudaViewMut};
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::matrix::{Matrix, Workspace};
use crate::quant::{Absmax, IntParts, NestedAbsmax, Parts, QuantConfig, QuantType, Quantized4bit, QuantizedInt};
use crate::view::{View, ViewMut};
use crate::weight::packed::{PackedForm, PackedKind};
use crate::weight::{FrozenWeight, Int8Activations, PlainData, PlainWeight};

/// A frozen weight `[rows, cols]` on a GPU: plain, in 4 bits, or in integers.
#[derive(Debug)]
pub struct CudaWeight {
    data: Data,
    rows: usize,
    cols: usize,
    /// For a weight that is not always there: the slots that it passes through, and its block.
    travels: Option<(Arc<DeviceRing>, usize)>,
}

enum Data {
    Plain { buffer: Buffer, dtype: Dtype },
    Bits4(Box<Bits4>),
    Int(Box<DeviceInt>),
}

/// As [`Parts`], in device memory.
struct Bits4 {
    codes: Buffer,
    absmax: DeviceAbsmax,
    quant_type: QuantType,
    blocksize: usize,
    /// See [`CudaWeight::column_most`].
    column_most: OnceLock<Buffer>,
}

enum DeviceAbsmax {
    Plain(Buffer),
    Nested { codes: Buffer, map: Buffer, absmax: Buffer, offset: f32, blocksize: usize },
}

impl CudaWeight {
    const OP: &'static str = "weight to the GPU";

    /// Copies a plain weight, in the workspace's type.
    ///
    /// # Errors
    /// If the memory cannot be had, or a value is not finite.
    pub fn plain(weight: &PlainWeight, workspace: &Workspace) -> Result<Self> {
        let (source, dtype) = (Source::Memory(bytes_of(weight.data())), Dtype::of(weight.data()));
        let mut uploader = Uploader::for_bytes(gpu_of(workspace)?, source.len());
        Self::plain_from(source, dtype, [weight.rows(), weight.cols()], workspace.dtype(), &mut uploader)
    }

    /// [`Self::plain`] of elements of type `from`, little-endian and row-major, which become `to`.
    ///
    /// # Errors
    /// If the number of bytes does not fit the shape, they cannot be read, the memory cannot be had, or a value is not finite.
    pub fn plain_from(
        source: Source,
        from: Dtype,
        [rows, cols]: [usize; 2],
        to: Dtype,
        uploader: &mut Uploader,
    ) -> Result<Self> {
        check_bytes(Self::OP, source, from, [rows, cols])?;
        let gpu = uploader.gpu().clone();
        let buffer = Buffer::new(&gpu, Self::OP, rows * cols * to.size())?;
        let target = (from == to).then(|| buffer.ptr());
        uploader.each(Self::OP, source, target, |piece| {
            let first = piece.at / from.size();
            if let Some(index) = first_non_finite(from, piece.host) {
                let message = format!("element {} is not finite (NaN or infinity)", first + index);
                return Err(Error::invalid(Self::OP, message));
            }
            if target.is_some() {
                return Ok(());
            }
            let len = piece.host.len() / from.size();
            let place = buffer.ptr() + (first * to.size()) as u64;
            // SAFETY: the piece and its place in the buffer have `len` elements of their type, and nobody else has views of
            // them; the cast is enqueued on the stream of the copy.
            let (source, target) = unsafe {
                (
                    CudaView::from_raw(&gpu, piece.device, from, [1, len], len, 0),
                    CudaViewMut::from_raw(&gpu, place, to, [1, len], len, 0),
                )
            };
            super::ops::cast(source, target)
        })?;
        Ok(Self { data: Data::Plain { buffer, dtype: to }, rows, cols, travels: None })
    }

    /// Copies a 4-bit weight.
    ///
    /// # Errors
    /// If the memory cannot be had.
    pub fn quantized(weight: &Quantized4bit, workspace: &Workspace) -> Result<Self> {
        let mut uploader = Uploader::for_bytes(gpu_of(workspace)?, weight.parts().codes.len());
        Self::quantized_from(weight, &mut uploader)
    }

    /// [`Self::quantized`] with an uploader.
    ///
    /// # Errors
    /// As there.
    pub fn quantized_from(weight: &Quantized4bit, uploader: &mut Uploader) -> Result<Self> {
        let Parts { codes, absmax, rows, cols, quant_type, blocksize, .. } = weight.parts();
        let codes = uploader.upload(Self::OP, Source::Memory(codes))?;
        let absmax = upload_absmax(uploader, absmax)?;
        let (quant_type, blocksize) = (*quant_type, *blocksize);
        let bits4 = Bits4 { codes, absmax, quant_type, blocksize, column_most: OnceLock::new() };
        Ok(Self { data: Data::Bits4(Box::new(bits4)), rows: *rows, cols: *cols, travels: None })
    }

    /// Copies an integer weight. Its products use the dequantized weight; LLM.int8's round their input to 8 bits first.
    ///
    /// # Errors
    /// If the memory cannot be had.
    pub fn integers(weight: &QuantizedInt, workspace: &Workspace) -> Result<Self> {
        let gpu = gpu_of(workspace)?;
        let IntParts { rows, cols, .. } = *weight.parts();
        Ok(Self { data: Data::Int(Box::new(DeviceInt::new(gpu, weight)?)), rows, cols, travels: None })
    }

    /// Quantizes on the GPU: the same bytes as [`Quantized4bit::quantize`]. (The absmax values are doubly quantized on
    /// the host: they are 1/64 of the weight.)
    ///
    /// # Errors
    /// As there; also if the memory cannot be had.
    pub fn quantize(
        data: &PlainData,
        rows: usize,
        cols: usize,
        config: &QuantConfig,
        workspace: &Workspace,
    ) -> Result<Self> {
        let mut uploader = Uploader::for_bytes(gpu_of(workspace)?, bytes_of(data).len());
        Self::quantize_with(data, rows, cols, config, &mut uploader)
    }

    /// [`Self::quantize`] with an uploader.
    ///
    /// # Errors
    /// As there.
    pub fn quantize_with(
        data: &PlainData,
        rows: usize,
        cols: usize,
        config: &QuantConfig,
        uploader: &mut Uploader,
    ) -> Result<Self> {
        let source = Source::Memory(bytes_of(data));
        let quantized = Self::quantize_from(source, Dtype::of(data), [rows, cols], config, uploader);
        if let Err(Error::Invalid { .. }) = quantized {
            // The CPU version names row, column and value, or finds the words for what else is wrong.
            Quantized4bit::quantize(data, rows, cols, config)?;
        }
        quantized
    }

    /// [`Self::quantize`] of elements of type `dtype`, little-endian and row-major; neither the host nor the GPU has more
    /// than a few pieces of them at a time. An error for a value does not say which.
    ///
    /// # Errors
    /// If the number of bytes does not fit the shape, they cannot be read, a value cannot be quantized, the block size is not
    /// one there is, or the memory cannot be had.
    pub fn quantize_from(
        source: Source,
        dtype: Dtype,
        [rows, cols]: [usize; 2],
        config: &QuantConfig,
        uploader: &mut Uploader,
    ) -> Result<Self> {
        const OP: &str = "quantize_4bit";
        check_bytes(OP, source, dtype, [rows, cols])?;
        crate::quant::check_blocksize(OP, config.blocksize)?;
        let QuantConfig { quant_type, blocksize, double_quant } = *config;
        let gpu = uploader.gpu().clone();
        let n = rows * cols;
        if n == 0 {
            return Err(Error::invalid(OP, "the weight has no elements"));
        }
        let blocks = n.div_ceil(blocksize);
        let mut codes = Buffer::new(&gpu, OP, n.div_ceil(2))?;
        let plain_absmax = if double_quant { None } else { Some(Buffer::new(&gpu, OP, 4 * blocks)?) };
        // The first value that cannot be quantized, in each piece; then the absmax values, if they do not stay.
        let bad = uploader.scratch(OP, 256 + if double_quant { 4 * blocks } else { 0 })?;
        let absmax = plain_absmax.as_ref().map_or(bad + 256, Buffer::ptr);
        gpu.bind(OP)?;
        // SAFETY: the scratch memory has these 8 bytes.
        unsafe { result::memset_d8_async(bad, 0xff, 8, gpu.stream().cu_stream()) }
            .map_err(|error| cuda_error(OP, error))?;
        let codes_ptr = codes.as_mut_ptr::<u8>();
        uploader.each(OP, source, None, |piece| {
            let first = piece.at / dtype.size();
            let len = piece.host.len() / dtype.size();
            // SAFETY: the piece has `len` elements; pieces begin with a block, so its codes and absmax values have places of
            // their own in outputs with the sizes that follow from the shape and the block size.
            gpu.launch(OP, |stream| unsafe {
                ffi::qlora_quantize_4bit(
                    dtype.code(),
                    piece.device as *const _,
                    len as i64,
                    quant_code(quant_type),
                    blocksize as i64,
                    codes_ptr.wrapping_add(first / 2),
                    (absmax as *mut f32).wrapping_add(first / blocksize),
                    bad as *mut u64,
                    stream,
                )
            })
        })?;
        if uploader.download::<u64>(OP, bad, 1)?[0] != u64::MAX {
            return Err(Error::invalid(OP, "a value is not finite or too large to be quantized"));
        }
        let absmax = match plain_absmax {
            Some(absmax) => DeviceAbsmax::Plain(absmax),
            None => {
                let values: Vec<f32> = uploader.download(OP, absmax, blocks)?;
                upload_absmax(uploader, &Absmax::Nested(NestedAbsmax::quantize(&values)))?
            }
        };
        let bits4 = Bits4 { codes, absmax, quant_type, blocksize, column_most: OnceLock::new() };
        Ok(Self { data: Data::Bits4(Box::new(bits4)), rows, cols, travels: None })
    }

    /// A weight whose piece ([`crate::weight::packed`]) lies in `memory` from the byte `at` on; with `travels`, only while its block runs.
    pub(super) fn of_piece(
        form: &PackedForm,
        memory: &PieceMemory,
        at: usize,
        travels: Option<(Arc<DeviceRing>, usize)>,
    ) -> Self {
        let mut arrays = form.arrays().into_iter().map(|place| memory.part(at + place.start, place.len()));
        let mut next = || arrays.next().expect("a form has as many arrays as its kind");
        let data = match form.kind {
            PackedKind::Plain(dtype) => Data::Plain { buffer: next(), dtype },
            PackedKind::Bits4 { quant_type, blocksize, nested, .. } => {
                let codes = next();
                let absmax = match nested {
                    None => DeviceAbsmax::Plain(next()),
                    Some((offset, blocksize)) => {
                        DeviceAbsmax::Nested { codes: next(), map: next(), absmax: next(), offset, blocksize }
                    }
                };
                Data::Bits4(Box::new(Bits4 { codes, absmax, quant_type, blocksize, column_most: OnceLock::new() }))
            }
        };
        Self { data, rows: form.rows, cols: form.cols, travels }
    }

    /// The weight's form and its arrays, as [`crate::weight::packed`] has them; none for integers.
    pub(super) fn piece(&self) -> Option<(PackedForm, Vec<&Buffer>)> {
        let (kind, arrays) = match &self.data {
            Data::Plain { buffer, dtype } => (PackedKind::Plain(*dtype), vec![buffer]),
            Data::Int(_) => return None,
            Data::Bits4(bits4) => {
                let (nested, arrays) = match &bits4.absmax {
                    DeviceAbsmax::Plain(values) => (None, vec![&bits4.codes, values]),
                    DeviceAbsmax::Nested { codes, map, absmax, offset, blocksize } => {
                        (Some((*offset, *blocksize)), vec![&bits4.codes, codes, map, absmax])
                    }
                };
                let Bits4 { quant_type, blocksize, .. } = **bits4;
                (PackedKind::Bits4 { quant_type, blocksize, source_dtype: Dtype::Bf16, nested }, arrays)
            }
        };
        Some((PackedForm { rows: self.rows, cols: self.cols, kind }, arrays))
    }

    /// The weight's form, if it can travel.
    pub fn packed_form(&self) -> Option<PackedForm> {
        self.piece().map(|(form, _)| form)
    }

    /// The weight as it lies in memory, if it is plain.
    pub(crate) fn plain_view(&self) -> Option<CudaView<'_>> {
        match &self.data {
            Data::Plain { buffer, dtype } => {
                // SAFETY: the buffer has rows * cols elements.
                Some(unsafe { CudaView::of_buffer(buffer, *dtype, [self.rows, self.cols], self.cols, 0) })
            }
            Data::Bits4(_) | Data::Int(_) => None,
        }
    }

    /// [`FrozenWeight::exact_columns`] on the device, and how many they are.
    pub(super) fn exact_on_device(&self) -> Option<(&Buffer, usize)> {
        match &self.data {
            Data::Int(int) => int.exact_on_device(),
            Data::Plain { .. } | Data::Bits4(_) => None,
        }
    }

    /// The weight as the kernels for few tokens take it, with `[blocksize, nested blocksize, type]`, if it has 4 bits.
    pub(super) fn few_member(&self) -> Option<([i64; 3], ffi::FewMember)> {
        let Data::Bits4(bits4) = &self.data else { return None };
        let mut member = ffi::FewMember { codes: bits4.codes.as_ptr(), rows: self.rows as i64, ..Default::default() };
        let nested_blocksize = match &bits4.absmax {
            DeviceAbsmax::Plain(absmax) => {
                member.absmax = absmax.as_ptr();
                0
            }
            DeviceAbsmax::Nested { codes, map, absmax, offset, blocksize } => {
                (member.absmax_codes, member.nested_map) = (codes.as_ptr(), map.as_ptr());
                (member.nested_absmax, member.nested_offset) = (absmax.as_ptr(), *offset);
                *blocksize as i64
            }
        };
        Some(([bits4.blocksize as i64, nested_blocksize, i64::from(quant_code(bits4.quant_type))], member))
    }

    /// The weight as the kernels of fp8 take it, if it has 4 bits.
    pub(super) fn bits4(&self) -> Option<ffi::Bits4> {
        let ([blocksize, nested_blocksize, quant_type], member) = self.few_member()?;
        Some(ffi::Bits4 {
            codes: member.codes,
            absmax: member.absmax,
            absmax_codes: member.absmax_codes,
            nested_map: member.nested_map,
            nested_absmax: member.nested_absmax,
            blocksize,
            nested_blocksize,
            rows: self.rows as i64,
            cols: self.cols as i64,
            nested_offset: member.nested_offset,
            quant_type: quant_type as i32,
        })
    }

    /// The largest magnitudes of the columns' blocks of a 4-bit weight whose blocks do not cross rows, `cols / blocksize`
    /// floats: made once, since the weight never changes.
    pub(super) fn column_most(&self) -> Result<&Buffer> {
        const OP: &str = "fp8_4bit_most";
        let (Data::Bits4(bits4), Some(blocksize), Some(part)) = (&self.data, self.row_blocks_of_4bit(), self.bits4())
        else {
            return Err(Error::invalid(OP, "the weight has no 4-bit blocks in its rows"));
        };
        if let Some(made) = bits4.column_most.get() {
            return Ok(made);
        }
        self.arrive()?;
        let gpu = self.gpu();
        let mut most = Buffer::new(gpu, OP, size_of::<f32>() * (self.cols / blocksize))?;
        most.fill_bytes(0)?;
        // SAFETY: the weight is live; there is a float for each block of its columns.
        gpu.launch(OP, |stream| unsafe { ffi::qlora_fp8_4bit_most(&part, most.as_mut_ptr(), stream) })?;
        // Another thread may have been faster; its values are the same.
        Ok(bits4.column_most.get_or_init(|| most))
    }

    /// Writes the whole weight into `out`, in its type.
    ///
    /// # Errors
    /// If the shapes do not fit, `out` is not on this GPU, or the device fails.
    pub fn dequantize(&self, out: ViewMut) -> Result<()> {
        Error::check_shape(Self::OP, "out", &[out.rows()], &[self.rows])?;
        self.dequantize_into(0, out.cuda(Self::OP)?)
    }

    /// Writes rows, from `first_row` on, into `out`, in its type.
    ///
    /// # Errors
    /// If the shapes do not fit, or the device fails.
    pub fn dequantize_into(&self, first_row: usize, out: CudaViewMut) -> Result<()> {
        const OP: &str = "dequantize_4bit";
        self.arrive()?;
        Error::check_shape(OP, "out", &[out.cols()], &[self.cols])?;
        if first_row + out.rows() > self.rows {
            return Err(Error::invalid(OP, format!("rows to {} of {}", first_row + out.rows(), self.rows)));
        }
        let bits4 = match &self.data {
            Data::Plain { .. } => {
                let whole = self.plain_view().expect("it is plain");
                return super::ops::cast(whole.slice_rows(first_row..first_row + out.rows()), out);
            }
            Data::Int(int) => return int.dequantize_into(first_row, out),
            Data::Bits4(bits4) => bits4,
        };
        let null = std::ptr::null::<u8>();
        let (plain, codes, map, absmax, offset, nested_blocksize) = match &bits4.absmax {
            DeviceAbsmax::Plain(absmax) => {
                (absmax.as_ptr::<f32>(), null, null.cast::<f32>(), null.cast::<f32>(), 0.0, 1)
            }
            DeviceAbsmax::Nested { codes, map, absmax, offset, blocksize } => {
                (null.cast(), codes.as_ptr::<u8>(), map.as_ptr(), absmax.as_ptr(), *offset, *blocksize)
            }
        };
        // SAFETY: all buffers are live and have the sizes that follow from the shape and the block sizes.
        out.gpu().launch(OP, |stream| unsafe {
            ffi::qlora_dequantize_4bit(
                out.dtype().code(),
                bits4.codes.as_ptr(),
                plain,
                codes,
                map,
                absmax,
                offset,
                quant_code(bits4.quant_type),
                bits4.blocksize as i64,
                nested_blocksize as i64,
                out.ptr() as *mut _,
                out.ld(),
                first_row as i64,
                out.rows() as i64,
                self.cols as i64,
                out.gpu().early(),
                stream,
            )
        })
    }

    /// The GPU.
    pub fn gpu(&self) -> &Arc<Gpu> {
        match &self.data {
            Data::Plain { buffer, .. } => buffer.gpu(),
            Data::Bits4(bits4) => bits4.codes.gpu(),
            Data::Int(int) => int.gpu(),
        }
    }

    /// The weight on the host again.
    ///
    /// # Errors
    /// If the device fails.
    pub fn to_quantized(&self, source_dtype: Dtype) -> Result<Option<Quantized4bit>> {
        let Data::Bits4(bits4) = &self.data else { return Ok(None) };
        self.arrive()?;
        let absmax = match &bits4.absmax {
            DeviceAbsmax::Plain(values) => Absmax::Plain(values.download()?),
            DeviceAbsmax::Nested { codes, map, absmax, offset, blocksize } => Absmax::Nested(NestedAbsmax {
                codes: codes.download()?,
                absmax: absmax.download()?,
                quant_map: map.download()?,
                offset: *offset,
                blocksize: *blocksize,
            }),
        };
        let parts = Parts {
            codes: bits4.codes.download()?,
            absmax,
            rows: self.rows,
            cols: self.cols,
            quant_type: bits4.quant_type,
            blocksize: bits4.blocksize,
            source_dtype,
        };
        Quantized4bit::from_parts(parts).map(Some)
    }
}

impl FrozenWeight for CudaWeight {
    fn rows(&self) -> usize {
        self.rows
    }

    fn cols(&self) -> usize {
        self.cols
    }

    /// Through a copy to the host: for checks.
    ///
    /// # Panics
    /// If the device fails.
    fn dequantize_rows(&self, range: Range<usize>, out: &mut [f32]) {
        let read = || -> Result<Vec<f32>> {
            let workspace = Workspace::with_dtype(&self.gpu().device(), Dtype::F32)?;
            let mut rows: Matrix = workspace.matrix(range.len(), self.cols)?;
            self.dequantize_into(range.start, rows.view_mut().cuda(Self::OP)?)?;
            View::to_vec(&rows.view())
        };
        out.copy_from_slice(&read().expect("the GPU copies a weight to the host"));
    }

    /// None of its own for a weight that travels.
    fn bytes(&self) -> usize {
        match &self.data {
            _ if self.travels.is_some() => 0,
            Data::Plain { buffer, .. } => buffer.bytes(),
            Data::Int(int) => int.bytes(),
            Data::Bits4(bits4) => {
                bits4.codes.bytes()
                    + match &bits4.absmax {
                        DeviceAbsmax::Plain(values) => values.bytes(),
                        // The offset is the launcher's argument.
                        DeviceAbsmax::Nested { codes, map, absmax, .. } => {
                            codes.bytes() + map.bytes() + absmax.bytes() + size_of::<f32>()
                        }
                    }
            }
        }
    }

    fn int8_activations(&self) -> Option<Int8Activations> {
        match &self.data {
            Data::Int(int) => int.activations(),
            Data::Plain { .. } | Data::Bits4(_) => None,
        }
    }

    fn exact_columns(&self) -> &[u32] {
        match &self.data {
            Data::Int(int) => int.exact_columns(),
            Data::Plain { .. } | Data::Bits4(_) => &[],
        }
    }

    fn row_blocks_of_4bit(&self) -> Option<usize> {
        match &self.data {
            Data::Bits4(bits4) => Some(bits4.blocksize).filter(|&blocksize| self.cols.is_multiple_of(blocksize)),
            Data::Plain { .. } | Data::Int(_) => None,
        }
    }

    fn arrive(&self) -> Result<()> {
        self.travels.as_ref().map_or(Ok(()), |(ring, block)| ring.enter(*block))
    }

    fn travels(&self) -> bool {
        self.travels.is_some()
    }

    fn as_cuda(&self) -> Option<&CudaWeight> {
        Some(self)
    }
}

fn gpu_of(workspace: &Workspace) -> Result<&Arc<Gpu>> {
    workspace.gpu().ok_or_else(|| Error::invalid(CudaWeight::OP, "the workspace is the CPU's"))
}

fn quant_code(quant_type: QuantType) -> i32 {
    match quant_type {
        QuantType::Nf4 => 0,
        QuantType::Fp4 => 1,
    }
}

fn upload_absmax(uploader: &mut Uploader, absmax: &Absmax) -> Result<DeviceAbsmax> {
    let mut upload = |bytes: &[u8]| uploader.upload(CudaWeight::OP, Source::Memory(bytes));
    Ok(match absmax {
        Absmax::Plain(values) => DeviceAbsmax::Plain(upload(bytemuck::cast_slice(values))?),
        Absmax::Nested(nested) => DeviceAbsmax::Nested {
            codes: upload(&nested.codes)?,
            map: upload(bytemuck::cast_slice(&nested.quant_map))?,
            absmax: upload(bytemuck::cast_slice(&nested.absmax))?,
            offset: nested.offset,
            blocksize: nested.blocksize,
        },
    })
}

fn check_bytes(op: &'static str, source: Source, dtype: Dtype, [rows, cols]: [usize; 2]) -> Result<()> {
    let expected = rows.checked_mul(cols).and_then(|n| n.checked_mul(dtype.size()));
    match expected == Some(source.len()) {
        true => Ok(()),
        false => Err(Error::invalid(op, format!("{} bytes are not {rows} x {cols} of {}", source.len(), dtype.name()))),
    }
}

fn bytes_of(data: &PlainData) -> &[u8] {
    match data {
        PlainData::F32(data) => bytemuck::cast_slice(data),
        PlainData::Bf16(data) => bytemuck::cast_slice(data),
        PlainData::F16(data) => bytemuck::cast_slice(data),
    }
}

/// The first element that is NaN or infinite: all bits of its exponent are set.
fn first_non_finite(dtype: Dtype, bytes: &[u8]) -> Option<usize> {
    fn find<T: Copy>(values: &[T], bad: impl Fn(T) -> bool) -> Option<usize> {
        // Without a branch for each element the first look is as fast as memory.
        match values.iter().fold(false, |any, &value| any | bad(value)) {
            true => values.iter().position(|&value| bad(value)),
            false => None,
        }
    }
    // Pieces begin at the start of page-locked memory, so they are aligned.
    match dtype {
        Dtype::F32 => find(bytemuck::cast_slice::<_, u32>(bytes), |bits| bits & 0x7f80_0000 == 0x7f80_0000),
        Dtype::Bf16 => find(bytemuck::cast_slice::<_, u16>(bytes), |bits| bits & 0x7f80 == 0x7f80),
        Dtype::F16 => find(bytemuck::cast_slice::<_, u16>(bytes), |bits| bits & 0x7c00 == 0x7c00),
    }
}

impl Dtype {
    fn of(data: &PlainData) -> Self {
        match data {
            PlainData::F32(_) => Self::F32,
            PlainData::Bf16(_) => Self::Bf16,
            PlainData::F16(_) => Self::F16,
        }
    }
}

impl fmt::Debug for Data {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Plain { dtype, .. } => f.write_str(dtype.name()),
            Self::Int(int) => write!(f, "{int:?}"),
            Self::Bits4(bits4) => write!(f, "{}, blocksize {}", bits4.quant_type, bits4.blocksize),
        }
    }
}
