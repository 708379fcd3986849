//! The device memory of an integer weight ([`crate::quant::QuantizedInt`]), and its dequantization.

use std::fmt;
use std::sync::Arc;

use half::bf16;

use super::buffer::Buffer;
use super::ffi;
use super::gpu::Gpu;
use super::view::CudaViewMut;
use crate::error::Result;
use crate::quant::{IntBits, IntParts, OutlierColumns, QuantizedInt};
use crate::weight::{Int8Activations, PlainData};

const OP: &str = "dequantize_int";

/// As [`IntParts`], in device memory.
pub(super) struct DeviceInt {
    codes: Buffer,
    scales: Buffer,
    zeros: Option<Buffer>,
    group_of: Option<Buffer>,
    /// Columns and their bf16 elements.
    outliers: Option<(Buffer, Buffer, usize)>,
    /// The outliers' columns again, on the host.
    exact: Vec<u32>,
    activations: Option<Int8Activations>,
    bits: IntBits,
    groups: usize,
    group_size: usize,
    cols: usize,
}

impl DeviceInt {
    pub(super) fn new(gpu: &Arc<Gpu>, weight: &QuantizedInt) -> Result<Self> {
        let IntParts { codes, bits, cols, group_size, group_of, scales, zeros, outliers, activations, .. } =
            weight.parts();
        let upload = |OutlierColumns { columns, values }: &OutlierColumns| -> Result<_> {
            let mut wide = vec![0.0; values.len()];
            let values = match values {
                PlainData::Bf16(values) => Buffer::upload(gpu, OP, values)?,
                other => {
                    other.to_f32(0..other.len(), &mut wide);
                    let rounded: Vec<bf16> = wide.iter().map(|&x| bf16::from_f32(x)).collect();
                    Buffer::upload(gpu, OP, &rounded)?
                }
            };
            Ok((Buffer::upload(gpu, OP, columns)?, values, columns.len()))
        };
        Ok(Self {
            codes: Buffer::upload(gpu, OP, codes)?,
            scales: Buffer::upload(gpu, OP, scales)?,
            zeros: zeros.as_ref().map(|zeros| Buffer::upload(gpu, OP, zeros)).transpose()?,
            group_of: group_of.as_ref().map(|group_of| Buffer::upload(gpu, OP, group_of)).transpose()?,
            outliers: outliers.as_ref().map(upload).transpose()?,
            exact: outliers.as_ref().map_or_else(Vec::new, |outliers| outliers.columns.clone()),
            activations: *activations,
            bits: *bits,
            groups: weight.groups(),
            group_size: *group_size,
            cols: *cols,
        })
    }

    pub(super) fn gpu(&self) -> &Arc<Gpu> {
        self.codes.gpu()
    }

    pub(super) fn activations(&self) -> Option<Int8Activations> {
        self.activations
    }

    pub(super) fn exact_columns(&self) -> &[u32] {
        &self.exact
    }

    /// [`Self::exact_columns`] on the device, and how many they are.
    pub(super) fn exact_on_device(&self) -> Option<(&Buffer, usize)> {
        self.outliers.as_ref().map(|(columns, _, count)| (columns, *count))
    }

    pub(super) fn bytes(&self) -> usize {
        let optional = [&self.zeros, &self.group_of].into_iter().flatten();
        let outliers = self.outliers.iter().flat_map(|(columns, values, _)| [columns, values]);
        [&self.codes, &self.scales].into_iter().chain(optional).chain(outliers).map(Buffer::bytes).sum()
    }

    /// Rows from `first_row` on; the caller checked the shape.
    pub(super) fn dequantize_into(&self, first_row: usize, out: CudaViewMut) -> Result<()> {
        let bits = match self.bits {
            IntBits::Four => 4,
            IntBits::Eight => 8,
        };
        let (columns, values, count) = match &self.outliers {
            Some((columns, values, count)) => (columns.as_ptr(), values.as_ptr(), *count as i64),
            None => (std::ptr::null(), std::ptr::null(), 0),
        };
        // SAFETY: all buffers are live and have the sizes that follow from the weight's shape and groups, which
        // `QuantizedInt` has checked.
        out.gpu().launch(OP, |stream| unsafe {
            ffi::qlora_dequantize_int(
                out.dtype().code(),
                bits,
                i32::from(self.zeros.is_none()),
                self.codes.as_ptr(),
                self.scales.as_ptr(),
                self.zeros.as_ref().map_or(std::ptr::null(), Buffer::as_ptr),
                self.groups as i64,
                self.group_size as i64,
                self.group_of.as_ref().map_or(std::ptr::null(), Buffer::as_ptr),
                columns,
                values,
                count,
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
}

impl fmt::Debug for DeviceInt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}-bit integers in {} groups a row", self.bits, self.groups)
    }
}
