//! A weight quantized piece by piece, as it is read.

use super::encode::{Element, LARGEST, encode};
use super::nested::{Absmax, NestedAbsmax};
use super::quantized4bit::{Parts, Quantized4bit};
use super::{QuantConfig, check_blocksize};
use crate::error::{Error, Result};

const OP: &str = "quantize_4bit";

/// Takes the elements of a weight in pieces of any length and holds no more of them than a part of a block.
///
/// The result does not depend on how the elements are cut into pieces. Pieces of some 100,000 elements and more keep
/// all threads busy.
#[derive(Debug)]
pub struct Quantizer<T> {
    config: QuantConfig,
    rows: usize,
    cols: usize,
    codes: Vec<u8>,
    absmax: Vec<f32>,
    /// The beginning of a block: elements after the last whole one.
    pending: Vec<T>,
}

impl<T: Element> Quantizer<T> {
    /// A quantizer for a weight of `rows * cols` elements.
    ///
    /// # Errors
    /// If the block size is none of [`super::BLOCKSIZES`], or there is no memory for the codes.
    pub fn new(rows: usize, cols: usize, config: &QuantConfig) -> Result<Self> {
        check_blocksize(OP, config.blocksize)?;
        let too_large = || Error::invalid(OP, format!("no memory for {rows} x {cols} 4-bit elements"));
        let elements = rows.checked_mul(cols).ok_or_else(too_large)?;
        let (mut codes, mut absmax) = (Vec::new(), Vec::new());
        codes.try_reserve_exact(elements.div_ceil(2)).map_err(|_| too_large())?;
        absmax.try_reserve_exact(elements.div_ceil(config.blocksize)).map_err(|_| too_large())?;
        Ok(Self { config: *config, rows, cols, codes, absmax, pending: Vec::with_capacity(config.blocksize) })
    }

    /// Quantizes the next elements, row-major, on all threads.
    ///
    /// # Errors
    /// If there are more than `rows * cols`, if one is not finite, or if one is larger than 2^126 (where the reciprocal
    /// of absmax is no normal f32). The error names its row and column; the quantizer is of no further use.
    pub fn push(&mut self, mut elements: &[T]) -> Result<()> {
        let blocksize = self.config.blocksize;
        if elements.len() > self.rows * self.cols - self.pushed() {
            let message =
                format!("got more than the {} elements of {} x {}", self.rows * self.cols, self.rows, self.cols);
            return Err(Error::invalid(OP, message));
        }
        if !self.pending.is_empty() {
            let missing = (blocksize - self.pending.len()).min(elements.len());
            let head;
            (head, elements) = elements.split_at(missing);
            self.pending.extend_from_slice(head);
            if self.pending.len() < blocksize {
                return Ok(());
            }
            self.flush_pending()?;
        }
        let (blocks, rest) = elements.split_at(elements.len() / blocksize * blocksize);
        self.encode(blocks)?;
        self.pending.extend_from_slice(rest);
        Ok(())
    }

    /// The quantized weight.
    ///
    /// # Errors
    /// If fewer elements were pushed than the weight has, and as [`Self::push`].
    pub fn finish(mut self) -> Result<Quantized4bit> {
        if self.pushed() != self.rows * self.cols {
            let message = format!("got {} elements for {} x {}", self.pushed(), self.rows, self.cols);
            return Err(Error::invalid(OP, message));
        }
        if !self.pending.is_empty() {
            self.flush_pending()?;
        }
        let absmax = if self.config.double_quant {
            Absmax::Nested(NestedAbsmax::quantize(&self.absmax))
        } else {
            Absmax::Plain(self.absmax)
        };
        Quantized4bit::from_parts(Parts {
            codes: self.codes,
            absmax,
            rows: self.rows,
            cols: self.cols,
            quant_type: self.config.quant_type,
            blocksize: self.config.blocksize,
            source_dtype: T::DTYPE,
        })
    }

    fn pushed(&self) -> usize {
        self.absmax.len() * self.config.blocksize + self.pending.len()
    }

    fn flush_pending(&mut self) -> Result<()> {
        let pending = std::mem::take(&mut self.pending);
        self.encode(&pending)?;
        self.pending = pending;
        self.pending.clear();
        Ok(())
    }

    /// Whole blocks, or the last one.
    fn encode(&mut self, elements: &[T]) -> Result<()> {
        let (byte, block) = (self.codes.len(), self.absmax.len());
        self.codes.resize(byte + elements.len().div_ceil(2), 0);
        self.absmax.resize(block + elements.len().div_ceil(self.config.blocksize), 0.0);
        let QuantConfig { quant_type, blocksize, .. } = self.config;
        encode(quant_type, blocksize, elements, &mut self.codes[byte..], &mut self.absmax[block..]).map_err(|i| {
            let mut value = [0.0];
            T::widen(&elements[i..=i], &mut value);
            let at = block * blocksize + i;
            let [value] = value;
            let why =
                if value.is_finite() { format!("; 4-bit blocks hold at most {LARGEST:e}") } else { String::new() };
            Error::invalid(OP, format!("row {}, column {} is {value}{why}", at / self.cols, at % self.cols))
        })
    }
}
