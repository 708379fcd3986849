//! The parts of an integer weight, and the check that they fit together; the shapes are in
//! [`quantized_int`](super::quantized_int).

use std::fmt;

use super::quantized_int::OP;
use crate::error::{Error, Result};
use crate::weight::{Int8Activations, PlainData};

/// The width of an integer code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum IntBits {
    /// Two codes a byte.
    Four,
    /// One code a byte.
    Eight,
}

impl IntBits {
    /// 4 or 8.
    pub fn bits(self) -> usize {
        match self {
            Self::Four => 4,
            Self::Eight => 8,
        }
    }

    /// The bytes that hold `elements` codes.
    pub fn bytes(self, elements: usize) -> usize {
        match self {
            Self::Four => elements.div_ceil(2),
            Self::Eight => elements,
        }
    }
}

/// The parts of an integer weight, on its way from or to a checkpoint or a device. The shapes are in [the table of
/// `quantized_int`](super::quantized_int).
#[derive(Clone, Debug, PartialEq)]
pub struct IntParts {
    /// The codes.
    pub codes: Vec<u8>,
    /// Their width.
    pub bits: IntBits,
    /// Output features.
    pub rows: usize,
    /// Input features.
    pub cols: usize,
    /// Neighbouring columns that share a scale; of no meaning with `group_of`.
    pub group_size: usize,
    /// The group of each column, where groups are not neighbours.
    pub group_of: Option<Vec<u16>>,
    /// The step between neighbouring codes, `[rows, groups]`.
    pub scales: Vec<f32>,
    /// The codes that mean 0, `[rows, groups]`; none if codes are signed.
    pub zeros: Option<Vec<f32>>,
    /// Columns that are not quantized.
    pub outliers: Option<OutlierColumns>,
    /// The rounding of the forward product's input, if there is one.
    pub activations: Option<Int8Activations>,
}

/// Columns of a weight that are kept in 16 bits.
#[derive(Clone)]
pub struct OutlierColumns {
    /// The indices of the columns, ascending.
    pub columns: Vec<u32>,
    /// Their elements, `[rows, columns.len()]`, bf16 or f16.
    pub values: PlainData,
}

/// Bit for bit, so that equal NaNs are equal.
impl PartialEq for OutlierColumns {
    fn eq(&self, other: &Self) -> bool {
        let same = match (&self.values, &other.values) {
            (PlainData::Bf16(a), PlainData::Bf16(b)) => a.iter().map(|x| x.to_bits()).eq(b.iter().map(|x| x.to_bits())),
            (PlainData::F16(a), PlainData::F16(b)) => a.iter().map(|x| x.to_bits()).eq(b.iter().map(|x| x.to_bits())),
            (PlainData::F32(a), PlainData::F32(b)) => a.iter().map(|x| x.to_bits()).eq(b.iter().map(|x| x.to_bits())),
            _ => false,
        };
        self.columns == other.columns && same
    }
}

impl fmt::Debug for OutlierColumns {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "OutlierColumns({:?})", self.columns)
    }
}

impl IntParts {
    /// The groups of a row, if everything fits.
    pub(super) fn check(&self) -> Result<usize> {
        let invalid = |message: String| Err(Error::invalid(OP, message));
        let IntParts { codes, bits, rows, cols, group_size, group_of, scales, zeros, outliers, activations } = self;
        let Some(elements) = rows.checked_mul(*cols) else {
            return invalid(format!("{rows} x {cols} elements are more than memory can hold"));
        };
        if codes.len() != bits.bytes(elements) {
            let (bits, bytes, got) = (bits.bits(), bits.bytes(elements), codes.len());
            return invalid(format!("{rows} x {cols} elements of {bits} bits need {bytes} bytes of codes, got {got}"));
        }
        let groups = scales.len() / (*rows).max(1);
        if groups * rows != scales.len() || (groups == 0 && elements > 0) {
            return invalid(format!("{} scales are not a number of groups for each of {rows} rows", scales.len()));
        }
        match group_of {
            Some(group_of) => {
                if group_of.len() != *cols {
                    return invalid(format!("group_of has {} entries for {cols} columns", group_of.len()));
                }
                if let Some(c) = group_of.iter().position(|&group| usize::from(group) >= groups) {
                    return invalid(format!("column {c} is in group {} of {groups}", group_of[c]));
                }
            }
            None if *group_size == 0 => return invalid("group_size is 0".to_owned()),
            None if elements > 0 && groups != cols.div_ceil(*group_size) => {
                let expected = cols.div_ceil(*group_size);
                return invalid(format!(
                    "{cols} columns in groups of {group_size} need {expected} scales a row, got {groups}"
                ));
            }
            None => {}
        }
        let finite = |what: &str, values: &[f32]| {
            let Some(i) = values.iter().position(|value| !value.is_finite()) else { return Ok(()) };
            let message = format!("{what} of row {}, group {} is {}", i / groups, i % groups, values[i]);
            Err(Error::invalid(OP, message))
        };
        finite("the scale", scales)?;
        if let Some(zeros) = zeros {
            if zeros.len() != scales.len() {
                return invalid(format!("{} zeros for {} scales", zeros.len(), scales.len()));
            }
            finite("the zero", zeros)?;
        }
        if let Some(outliers) = outliers {
            check_outliers(outliers, *rows, *cols)?;
        }
        if activations.is_some_and(|a| !(a.threshold.is_finite() && a.threshold >= 0.0)) {
            return invalid("the threshold of outlier activations is negative or not finite".to_owned());
        }
        Ok(groups)
    }
}

fn check_outliers(outliers: &OutlierColumns, rows: usize, cols: usize) -> Result<()> {
    let OutlierColumns { columns, values } = outliers;
    check_columns(columns, cols)?;
    if rows.checked_mul(columns.len()) != Some(values.len()) {
        let (n, got) = (columns.len(), values.len());
        return Err(Error::invalid(
            OP,
            format!("{n} outlier columns of {rows} rows need {rows} x {n} values, got {got}"),
        ));
    }
    if matches!(values, PlainData::F32(_)) {
        return Err(Error::invalid(OP, "outlier columns are bf16 or f16, not f32"));
    }
    match values.first_non_finite() {
        Some(i) => {
            let (row, column) = (i / columns.len(), columns[i % columns.len()]);
            Err(Error::invalid(OP, format!("the outlier at row {row}, column {column} is not finite")))
        }
        None => Ok(()),
    }
}

/// Checks that columns ascend and exist.
pub(super) fn check_columns(columns: &[u32], cols: usize) -> Result<()> {
    let ordered = columns.windows(2).all(|pair| pair[0] < pair[1]);
    if ordered && columns.last().is_none_or(|&last| (last as usize) < cols) {
        return Ok(());
    }
    Err(Error::invalid(OP, format!("outlier columns must ascend and lie below {cols}")))
}
