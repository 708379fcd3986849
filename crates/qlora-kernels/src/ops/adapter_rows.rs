//! Different adapters for different rows of one batch.
//!
//! A part of the rows belongs to one adapter, which may change a linear layer in several ways. With `x [rows, in]` of the part:
//!
//! ```text
//! y = residual + g * (x W'^T + s x A^T B^T) + bias'
//! ```
//!
//! A `[r, in]` and B `[out, r]`: LoRA's factors; g `[out]`: DoRA's magnitude over the norm of the weight's rows (arXiv
//! 2402.09353, constant once training is over); bias' and W': instead of the layer's own. A part that a
//! [`LinearChange`] does not have leaves the layer as it is. All of an adapter's numbers lie in one f32 row on the
//! model's device, but for whole weights.
//!
//! The base's product is made once for all rows whose adapters only add to it. Sums are f32 on the CPU.
//!
//! On CUDA one LoRA adapter for all rows of quantized layers runs in the group itself, as the adapter of a training does.
//! Otherwise one launch makes `x A^T` of all rows, the base's product is written in the activations' type, and one more launch
//! reads y again and does the rest, in f32 (`kernels/adapter_rows.cu`). So y is rounded twice there, as in PEFT.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use super::linear_group::{AdapterPass, Group, LoraSlot, Member, margin};
use super::{frozen_linear, lora_linear, rms_norm};
use crate::error::{Error, Result};
use crate::matrix::Workspace;
use crate::view::{View, ViewMut};
use crate::weight::{FrozenWeight, WeightCache};

/// The change that an adapter makes to one linear layer.
#[derive(Clone, Debug, Default)]
pub struct LinearChange {
    /// LoRA's factors in the adapter's values.
    pub lora: Option<LoraSlot>,
    /// DoRA's factor of every output feature, in the adapter's values.
    pub gain: Option<Range<usize>>,
    /// The bias that is added in place of the layer's, in the adapter's values.
    pub bias: Option<Range<usize>>,
    /// The weight in place of the layer's.
    pub weight: Option<Arc<dyn FrozenWeight>>,
}

impl LinearChange {
    /// Whether the layer's own product and bias stay as they are.
    fn only_adds(&self) -> bool {
        self.gain.is_none() && self.bias.is_none() && self.weight.is_none()
    }
}

/// The changes that an adapter makes to a model, by the modules' names.
#[derive(Clone, Debug, Default)]
pub struct AdapterChanges {
    /// Linear layers.
    pub linears: HashMap<String, LinearChange>,
    /// Norms: their weight in the adapter's values.
    pub norms: HashMap<String, Range<usize>>,
}

/// The adapter of some rows.
#[derive(Clone, Debug)]
pub struct RowAdapter<'a> {
    /// The rows.
    pub rows: Range<usize>,
    /// The adapter's numbers, f32, one row.
    pub values: View<'a>,
    /// The changes that the values belong to.
    pub changes: &'a AdapterChanges,
}

/// The adapters of a batch; rows without one are the base model's.
#[derive(Clone, Debug, Default)]
pub struct AdapterRows<'a> {
    parts: Vec<RowAdapter<'a>>,
}

impl<'a> AdapterRows<'a> {
    /// The adapters of these rows.
    ///
    /// # Errors
    /// If the parts are not in the order of their rows, or share some.
    pub fn new(parts: Vec<RowAdapter<'a>>) -> Result<Self> {
        let ordered = parts.windows(2).all(|pair| pair[0].rows.end <= pair[1].rows.start);
        if !ordered || parts.iter().any(|part| part.rows.start > part.rows.end) {
            return Err(Error::invalid(OP, "the rows of the adapters overlap or are not in order"));
        }
        Ok(Self { parts })
    }

    /// The parts.
    pub fn parts(&self) -> &[RowAdapter<'a>] {
        &self.parts
    }

    /// [`Group::forward`] with these adapters; those of the members themselves are left out.
    ///
    /// # Errors
    /// As there; also if an adapter does not fit the layer.
    pub fn forward(
        &self,
        group: &Group,
        x: ViewMut,
        residual: Option<View>,
        y: ViewMut,
        workspace: &Workspace,
    ) -> Result<()> {
        self.run(group, x, residual, y, false, workspace)
    }

    /// [`Group::infer`] with these adapters.
    ///
    /// # Errors
    /// As [`Self::forward`].
    pub fn infer(
        &self,
        group: &Group,
        x: ViewMut,
        residual: Option<View>,
        y: ViewMut,
        workspace: &Workspace,
    ) -> Result<()> {
        self.run(group, x, residual, y, true, workspace)
    }

    /// [`Group::infer_swiglu`] with these adapters: not where rows have different ones.
    ///
    /// # Errors
    /// As [`Self::forward`].
    pub fn infer_swiglu(&self, group: &Group, x: View, h: ViewMut, workspace: &Workspace) -> Result<bool> {
        match self.changed(group, x.rows())?.as_slice() {
            [] => with_group(group, None, |group, _| group.infer_swiglu(x, None, h, workspace)),
            [part] if part.runs_as_group(group, x.rows()) => {
                with_group(group, Some(part), |group, pass| group.infer_swiglu(x, pass, h, workspace))
            }
            _ => Ok(false),
        }
    }

    /// The columns of margin that a group's input needs so that these adapters can use it ([`super::linear_group::margin`]).
    pub fn margin(&self, members: &[Member]) -> usize {
        let of = |part: &RowAdapter<'a>| {
            margin(members.iter().map(|member| part.change(member).and_then(|change| change.lora.as_ref())))
        };
        self.parts.iter().map(of).max().unwrap_or(0)
    }

    /// The parts that change a member of the group.
    fn changed(&self, group: &Group, rows: usize) -> Result<Vec<&RowAdapter<'a>>> {
        if let Some(part) = self.parts.last().filter(|part| part.rows.end > rows) {
            return Err(Error::invalid(OP, format!("{rows} rows, an adapter for {:?}", part.rows)));
        }
        let changed = |part: &RowAdapter<'a>| group.members.iter().any(|member| part.change(member).is_some());
        Ok(self.parts.iter().filter(|part| !part.rows.is_empty() && changed(part)).collect())
    }

    /// `few`: [`Group::infer`] instead of [`Group::forward`].
    fn run(
        &self,
        group: &Group,
        x: ViewMut,
        residual: Option<View>,
        y: ViewMut,
        few: bool,
        workspace: &Workspace,
    ) -> Result<()> {
        let parts = self.changed(group, x.rows())?;
        let part = match parts.as_slice() {
            [] => None,
            [part] if part.runs_as_group(group, x.rows()) => Some(*part),
            parts => {
                #[cfg(feature = "cuda")]
                if y.gpu().is_some() {
                    return crate::cuda::adapter_rows::forward(OP, group, parts, x, residual, y, few, workspace);
                }
                return by_rows(group, parts, x.as_view(), residual, y, workspace);
            }
        };
        with_group(group, part, |group, pass| match few {
            true => group.infer(x, pass, residual, y, workspace),
            false => group.forward(x, pass, residual, y, workspace).map(drop),
        })
    }

    /// [`rms_norm::forward`] again, over the rows whose adapter has another weight for the norm `name()`.
    ///
    /// # Errors
    /// As there.
    pub fn renorm(
        &self,
        name: impl FnOnce() -> String,
        x: View,
        eps: f32,
        mut y: ViewMut,
        workspace: &Workspace,
    ) -> Result<()> {
        if self.parts.iter().all(|part| part.changes.norms.is_empty()) {
            return Ok(());
        }
        let name = name();
        for part in &self.parts {
            let Some(weight) = part.changes.norms.get(&name) else { continue };
            let weight = part.slice(weight)?;
            let norms = part.rows.len() * x.cols() / weight.cols().max(1);
            let mut rstd = workspace.matrix_f32(part.rows.len(), norms / part.rows.len().max(1))?;
            let y = y.reborrow().slice_rows(part.rows.clone());
            rms_norm::forward(x.slice_rows(part.rows.clone()), weight, eps, y, rstd.view_mut())?;
        }
        Ok(())
    }
}

const OP: &str = "adapter_rows";

impl<'a> RowAdapter<'a> {
    pub(crate) fn change(&self, member: &Member) -> Option<&'a LinearChange> {
        self.changes.linears.get(member.name)
    }

    /// Whether an ordinary group of these rows computes the same: without a gain, and on a GPU without plain weights, which
    /// are multiplied where they lie and not copied beside A and B.
    fn runs_as_group(&self, group: &Group, rows: usize) -> bool {
        let fits = |member: &Member| match self.change(member) {
            None => !is_plain_on_gpu(member.weight),
            Some(change) => {
                change.gain.is_none() && !is_plain_on_gpu(change.weight.as_deref().unwrap_or(member.weight))
            }
        };
        self.rows == (0..rows) && group.members.iter().all(fits)
    }

    /// A part of the adapter's numbers, one row.
    ///
    /// # Errors
    /// If it is not inside them.
    pub fn slice(&self, range: &Range<usize>) -> Result<View<'a>> {
        let len = self.values.cols();
        if range.start > range.end || range.end > len {
            return Err(Error::invalid(OP, format!("elements {range:?} of an adapter of {len}")));
        }
        Ok(self.values.slice_cols(range.clone()))
    }
}

/// Whether a weight lies on a GPU in a type that products take.
pub(crate) fn is_plain_on_gpu(weight: &dyn FrozenWeight) -> bool {
    #[cfg(feature = "cuda")]
    if let Some(weight) = weight.as_cuda() {
        return weight.plain_view().is_some();
    }
    let _ = weight;
    false
}

/// One adapter, or none, for all rows, without a gain: an ordinary group.
fn with_group<R>(
    group: &Group,
    part: Option<&RowAdapter>,
    run: impl FnOnce(&Group, Option<&AdapterPass>) -> Result<R>,
) -> Result<R> {
    let change = |member: &Member| part.and_then(|part| part.change(member));
    let mut members = Vec::with_capacity(group.members.len());
    for member in group.members {
        let mut member = Member { lora: None, ..*member };
        if let (Some(part), Some(change)) = (part, change(&member)) {
            member.lora = change.lora.as_ref();
            if let Some(bias) = &change.bias {
                member.bias = Some(part.slice(bias)?);
            }
            if let Some(weight) = &change.weight {
                member.weight = &**weight;
            }
        }
        members.push(member);
    }
    let own = WeightCache::default();
    let replaced = group.members.iter().any(|member| change(member).is_some_and(|change| change.weight.is_some()));
    let group = Group { members: &members, cache: if replaced { &own } else { group.cache }, split: group.split };
    let pass = part.map(|part| AdapterPass::new(part.values));
    run(&group, pass.as_ref())
}

/// Several adapters, or a gain: member by member, on the CPU.
fn by_rows(
    group: &Group,
    parts: &[&RowAdapter],
    x: View,
    residual: Option<View>,
    mut y: ViewMut,
    workspace: &Workspace,
) -> Result<()> {
    let tokens = x.rows();
    let mut start = 0;
    for member in group.members {
        let columns = start..start + member.weight.rows();
        start = columns.end;
        // Rows from here on are the base's, until a part makes its own product.
        let mut from = 0;
        for part in parts {
            let Some(change) = part.change(member).filter(|change| !change.only_adds()) else { continue };
            base(member, columns.clone(), from..part.rows.start, x, residual, y.reborrow(), workspace)?;
            from = part.rows.end;
            let (x, mut y) = (x.slice_rows(part.rows.clone()), window(y.reborrow(), &part.rows, &columns));
            let weight = change.weight.as_deref().unwrap_or(member.weight);
            frozen_linear::forward(x, weight, y.reborrow(), 0.0, workspace)?;
            add_lora(part, change, member, x, y.reborrow(), workspace)?;
            let gain = change.gain.as_ref().map(|range| part.slice(range)).transpose()?;
            let bias = change.bias.as_ref().map(|range| part.slice(range)).transpose()?.or(member.bias);
            let residual = residual.map(|all| all.slice_rows(part.rows.clone()).slice_cols(columns.clone()));
            finish(gain, bias, residual, y)?;
        }
        base(member, columns.clone(), from..tokens, x, residual, y.reborrow(), workspace)?;
        for part in parts {
            let Some(change) = part.change(member).filter(|change| change.only_adds()) else { continue };
            let (x, y) = (x.slice_rows(part.rows.clone()), window(y.reborrow(), &part.rows, &columns));
            add_lora(part, change, member, x, y, workspace)?;
        }
    }
    Ok(())
}

fn window<'a>(y: ViewMut<'a>, rows: &Range<usize>, columns: &Range<usize>) -> ViewMut<'a> {
    y.slice_rows(rows.clone()).slice_cols(columns.clone())
}

/// `y = residual + x W^T + bias` on some rows.
fn base(
    member: &Member,
    columns: Range<usize>,
    rows: Range<usize>,
    x: View,
    residual: Option<View>,
    y: ViewMut,
    workspace: &Workspace,
) -> Result<()> {
    if rows.is_empty() {
        return Ok(());
    }
    let mut y = window(y, &rows, &columns);
    frozen_linear::forward(x.slice_rows(rows.clone()), member.weight, y.reborrow(), 0.0, workspace)?;
    finish(None, member.bias, residual.map(|all| all.slice_rows(rows).slice_cols(columns)), y)
}

fn add_lora(
    part: &RowAdapter,
    change: &LinearChange,
    member: &Member,
    x: View,
    y: ViewMut,
    workspace: &Workspace,
) -> Result<()> {
    let Some(slot) = &change.lora else { return Ok(()) };
    let (inputs, outputs) = (member.weight.cols(), member.weight.rows());
    Error::check_shape(OP, "A", &[slot.a.len()], &[slot.rank * inputs])?;
    Error::check_shape(OP, "B", &[slot.b.len()], &[outputs * slot.rank])?;
    let a = part.slice(&slot.a)?.reshape(slot.rank, inputs);
    let b = part.slice(&slot.b)?.reshape(outputs, slot.rank);
    let mut s = workspace.matrix(x.rows(), slot.rank)?;
    lora_linear::forward(x, a, b, slot.scale, None, s.view_mut(), y, workspace)
}

/// `y = residual + gain * y + bias`.
fn finish(gain: Option<View>, bias: Option<View>, residual: Option<View>, y: ViewMut) -> Result<()> {
    fn vector<'a>(view: Option<View<'a>>, what: &'static str, cols: usize) -> Result<Option<&'a [f32]>> {
        let Some(view) = view else { return Ok(None) };
        Error::check_shape(OP, what, &[view.rows() * view.cols()], &[cols])?;
        let gaps = || Error::invalid(OP, format!("the {what} has gaps between its elements"));
        view.host(OP)?.as_slice().map(Some).ok_or_else(gaps)
    }
    if gain.is_none() && bias.is_none() && residual.is_none() {
        return Ok(());
    }
    let (gain, bias) = (vector(gain, "gain", y.cols())?, vector(bias, "bias", y.cols())?);
    let residual = residual.map(|view| view.host(OP)).transpose()?;
    for (i, row) in y.host(OP)?.rows_mut().enumerate() {
        if let Some(gain) = gain {
            row.iter_mut().zip(gain).for_each(|(y, g)| *y *= g);
        }
        if let Some(bias) = bias {
            row.iter_mut().zip(bias).for_each(|(y, b)| *y += b);
        }
        if let Some(residual) = &residual {
            row.iter_mut().zip(residual.row(i)).for_each(|(y, r)| *y += r);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_close, random, to_f64};
    use crate::weight::{PlainData, PlainWeight};

    const IN: usize = 7;
    const OUT: usize = 5;
    const ROWS: usize = 9;

    /// `residual + g * (x W^T + s x A^T B^T) + bias` in f64, all of it optional.
    struct Reference<'a> {
        weight: &'a [f64],
        lora: Option<(&'a [f64], &'a [f64], f64)>,
        gain: Option<&'a [f64]>,
        bias: &'a [f64],
    }

    impl Reference<'_> {
        fn row(&self, x: &[f64], residual: &[f64]) -> Vec<f64> {
            let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
            (0..OUT)
                .map(|j| {
                    let mut y = dot(x, &self.weight[j * IN..][..IN]);
                    if let Some((a, b, scale)) = self.lora {
                        let s: Vec<f64> = a.chunks_exact(IN).map(|a| dot(x, a)).collect();
                        y += scale * dot(&s, &b[j * s.len()..][..s.len()]);
                    }
                    residual[j] + self.gain.map_or(1.0, |gain| gain[j]) * y + self.bias[j]
                })
                .collect()
        }
    }

    #[test]
    fn every_row_gets_its_own_adapter() {
        let mut random = random(3);
        let (x, weight, bias) = (random(ROWS * IN), random(OUT * IN), random(OUT));
        let (residual, other) = (random(ROWS * OUT), random(OUT * IN));
        let plain = |data: &[f32]| PlainWeight::new(PlainData::F32(data.to_vec()), OUT, IN);
        let base = plain(&weight);
        let name = "layer";
        let member = Member { name, weight: &base, bias: Some(View::vector(&bias)), lora: None };
        let cache = WeightCache::default();
        let members = [member];
        let group = Group { members: &members, cache: &cache, split: false };
        let workspace = Workspace::poisoned();

        // Values of the adapters: A and B of rank 2, a gain, a bias.
        let (a, b, gain, own_bias) = (random(2 * IN), random(OUT * 2), random(OUT), random(OUT));
        let values = [a.as_slice(), &b, &gain, &own_bias].concat();
        let (ab, ag) = (2 * IN + 2 * OUT, 2 * IN + 3 * OUT);
        let slot = LoraSlot { a: 0..2 * IN, b: 2 * IN..ab, rank: 2, scale: 0.5, stream: 0, kind: Default::default() };
        let change = |lora: bool, gain: bool, bias: bool, weight: bool| {
            let change = LinearChange {
                lora: lora.then(|| slot.clone()),
                gain: gain.then_some(ab..ag),
                bias: bias.then_some(ag..ag + OUT),
                weight: weight.then(|| Arc::new(plain(&other)) as Arc<dyn FrozenWeight>),
            };
            AdapterChanges { linears: HashMap::from([(name.to_owned(), change)]), ..Default::default() }
        };
        let kinds = [
            (true, false, false, false),
            (true, true, false, false),
            (true, false, true, false),
            (false, false, false, true),
            (true, true, true, true),
        ];
        let changes: Vec<AdapterChanges> = kinds.iter().map(|&(l, g, b, w)| change(l, g, b, w)).collect();
        let [x64, w64, o64, b64, r64] = [&x, &weight, &other, &bias, &residual].map(|data| to_f64(data));
        let [a64, lb64, g64, ob64] = [&a, &b, &gain, &own_bias].map(|data| to_f64(data));
        let expect = |kind: Option<usize>, row: usize| {
            let (l, g, b, w) = kind.map_or((false, false, false, false), |kind| kinds[kind]);
            Reference {
                weight: if w { &o64 } else { &w64 },
                lora: l.then_some((&a64[..], &lb64[..], 0.5)),
                gain: g.then_some(&g64[..]),
                bias: if b { &ob64 } else { &b64 },
            }
            .row(&x64[row * IN..][..IN], &r64[row * OUT..][..OUT])
        };
        let run = |parts: &[(Range<usize>, usize)]| {
            let part = |(rows, kind): &(Range<usize>, usize)| RowAdapter {
                rows: rows.clone(),
                values: View::vector(&values),
                changes: &changes[*kind],
            };
            let rows = AdapterRows::new(parts.iter().map(part).collect()).unwrap();
            let (mut x, mut y) = (x.clone(), vec![f32::NAN; ROWS * OUT]);
            let residual = Some(View::new(&residual, ROWS, OUT));
            let (x, target) = (ViewMut::new(&mut x, ROWS, IN), ViewMut::new(&mut y, ROWS, OUT));
            rows.forward(&group, x, residual, target, &workspace).unwrap();
            let of = |row: usize| parts.iter().find(|(rows, _)| rows.contains(&row)).map(|(_, kind)| *kind);
            let want: Vec<f64> = (0..ROWS).flat_map(|row| expect(of(row), row)).collect();
            assert_close("y", &y, &want, 3e-6);
        };
        run(&[]);
        for kind in 0..kinds.len() {
            run(&[(0..ROWS, kind)]);
            run(&[(2..4, kind)]);
        }
        run(&[(0..2, 0), (2..3, 1), (4..5, 4), (5..6, 0), (6..9, 2)]);
        run(&[(1..2, 3), (2..8, 1)]);
    }

    #[test]
    fn rows_that_overlap_or_are_not_there_are_refused() {
        let changes = AdapterChanges::default();
        let part = |rows| RowAdapter { rows, values: View::vector(&[]), changes: &changes };
        assert!(AdapterRows::new(vec![part(0..2), part(1..3)]).is_err());
        assert!(AdapterRows::new(vec![part(2..3), part(0..1)]).is_err());
        let rows = AdapterRows::new(vec![part(0..4)]).unwrap();
        let weight = PlainWeight::new(PlainData::F32(vec![1.0]), 1, 1);
        let members = [Member { name: "", weight: &weight, bias: None, lora: None }];
        let cache = WeightCache::default();
        let group = Group { members: &members, cache: &cache, split: false };
        let (mut x, mut y) = ([1.0; 2], [0.0; 2]);
        let (x, y) = (ViewMut::new(&mut x, 2, 1), ViewMut::new(&mut y, 2, 1));
        let error = rows.forward(&group, x, None, y, &Workspace::poisoned()).unwrap_err().to_string();
        assert!(error.contains("2 rows, an adapter for 0..4"), "{error}");
    }
}
