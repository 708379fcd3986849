//! The output head and the cross-entropy in one: logits never exist whole.
//!
//! With `hidden [tokens, width]`, a frozen head `W [vocab, width]` and a target `y` for each trained token:
//!
//! ```text
//! z = hidden W^T        loss = sum over trained tokens of (logsumexp(z) - z_y)
//! dz = (softmax(z) - onehot_y) * scale            dhidden = dz W
//! ```
//!
//! `scale` is `1 / num_items` for a mean, or one number a row ([`GradScale`]): an objective whose gradient is
//! `sum_t w_t d log p_t` has `scale_t = -w_t`, because `log p_t` is minus the token's cross-entropy.
//!
//! Only rows with a target are multiplied: they are gathered, some hundred at a time, so that a chunk of logits takes at
//! most 64 MiB. The head may have trained parts ([`Table`]), whose gradient is added up as it goes. The gradient is made in the same pass, in place over the logits, so nothing is computed twice: the whole
//! costs two products. `num_items` is an input because an optimizer step divides by the trained tokens of all its
//! micro-batches. Logits are f32, the loss is summed in f64 in the order of the rows.

use rayon::iter::{IndexedParallelIterator, ParallelIterator};
use rayon::slice::ParallelSliceMut;

use crate::error::{Error, Result};
use crate::math;
use crate::matrix::Workspace;
use crate::ops::frozen_linear;
use crate::ops::trained_tables::Table;
use crate::simd::vectorize;
use crate::view::{View, ViewMut};
use crate::weight::FrozenWeight;

const OP: &str = "linear_cross_entropy";

/// The target of a token that is not trained, as in PyTorch.
pub const IGNORE_INDEX: i64 = -100;

/// Logits of a chunk: 64 MiB.
const CHUNK: usize = 1 << 24;

/// A sum of cross-entropies and the number of tokens it runs over.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LossSum {
    /// The sum, in nats, not divided.
    pub sum: f64,
    /// The tokens with a target.
    pub trained_tokens: usize,
}

/// The factor of the gradient of each row's cross-entropy.
#[derive(Clone, Copy, Debug)]
pub enum GradScale<'a> {
    /// The same for all rows: `1 / num_items` for a mean.
    Uniform(f32),
    /// One number a row of `hidden`; those of rows without a target are not read.
    PerRow(&'a [f32]),
}

impl GradScale<'_> {
    fn of(self, row: usize) -> f32 {
        match self {
            Self::Uniform(scale) => scale,
            Self::PerRow(scales) => scales[row],
        }
    }
}

/// The number of tokens whose logits exist at a time on a GPU: 256 MB in bf16. With 128,256 tokens in the vocabulary
/// that is 1,024 rows, enough for matrix products at full speed.
pub fn rows_of_chunk_on_gpu(vocab: usize) -> usize {
    const ELEMENTS: usize = 1 << 27;
    let rows = (ELEMENTS / vocab.max(1)).max(1);
    if rows > 128 { rows / 128 * 128 } else { rows }
}

/// A loss that a GPU may still be computing: reading it waits.
#[derive(Debug)]
pub struct PendingLoss {
    state: Pending,
    trained_tokens: usize,
}

#[derive(Debug)]
enum Pending {
    Ready(f64),
    #[cfg(feature = "cuda")]
    OnDevice(crate::cuda::Buffer),
}

impl PendingLoss {
    fn ready(loss: LossSum) -> Self {
        Self { state: Pending::Ready(loss.sum), trained_tokens: loss.trained_tokens }
    }

    /// One f64 that the stream is going to write.
    #[cfg(feature = "cuda")]
    pub(crate) fn on_device(sum: crate::cuda::Buffer, trained_tokens: usize) -> Self {
        Self { state: Pending::OnDevice(sum), trained_tokens }
    }

    /// Waits for the loss.
    ///
    /// # Errors
    /// If the device failed.
    #[cfg_attr(not(feature = "cuda"), allow(clippy::infallible_destructuring_match, reason = "one kind on the CPU"))]
    pub fn wait(self) -> Result<LossSum> {
        let sum = match self.state {
            Pending::Ready(sum) => sum,
            #[cfg(feature = "cuda")]
            Pending::OnDevice(buffer) => buffer.download::<f64>()?[0],
        };
        Ok(LossSum { sum, trained_tokens: self.trained_tokens })
    }
}

/// The loss alone.
///
/// # Errors
/// If the shapes do not fit, or a target is neither in the vocabulary nor [`IGNORE_INDEX`].
pub fn forward(hidden: View, head: &dyn FrozenWeight, targets: &[i64], workspace: &Workspace) -> Result<LossSum> {
    forward_with(hidden, Table::frozen(head), targets, workspace)
}

/// [`forward`] with a head that an adapter has parts of.
///
/// # Errors
/// As there; also if the adapter's parts do not fit.
pub fn forward_with(hidden: View, head: Table, targets: &[i64], workspace: &Workspace) -> Result<LossSum> {
    run(hidden, head, targets, None, None, workspace)?.wait()
}

/// The cross-entropy of each row, in nats: minus the log-probability of its target. Rows without a target have 0.
///
/// # Errors
/// As [`forward`].
pub fn token_losses(hidden: View, head: &dyn FrozenWeight, targets: &[i64], workspace: &Workspace) -> Result<Vec<f64>> {
    token_losses_with(hidden, Table::frozen(head), targets, workspace)
}

/// [`token_losses`] with a head that an adapter has parts of.
///
/// # Errors
/// As there; also if the adapter's parts do not fit.
pub fn token_losses_with(hidden: View, head: Table, targets: &[i64], workspace: &Workspace) -> Result<Vec<f64>> {
    let mut losses = vec![0.0; targets.len()];
    run(hidden, head, targets, None, Some(&mut losses), workspace)?.wait()?;
    Ok(losses)
}

/// The loss, and `d (sum / num_items) / d hidden` in `dhidden [tokens, width]`; rows without a target get zeros.
///
/// # Errors
/// As [`forward`]; also if `num_items` is 0 although a token is trained.
pub fn forward_backward(
    hidden: View,
    head: &dyn FrozenWeight,
    targets: &[i64],
    num_items: usize,
    dhidden: ViewMut,
    workspace: &Workspace,
) -> Result<LossSum> {
    enqueue(hidden, head, targets, num_items, dhidden, workspace)?.wait()
}

/// [`forward_backward`] without waiting for the loss: a GPU goes on with what depends on the gradient meanwhile.
///
/// # Errors
/// As there.
pub fn enqueue(
    hidden: View,
    head: &dyn FrozenWeight,
    targets: &[i64],
    num_items: usize,
    dhidden: ViewMut,
    workspace: &Workspace,
) -> Result<PendingLoss> {
    if num_items == 0 && targets.iter().any(|&target| target != IGNORE_INDEX) {
        return Err(Error::invalid(OP, "num_items is 0 although tokens are trained"));
    }
    enqueue_scaled(hidden, head, targets, GradScale::Uniform(1.0 / num_items.max(1) as f32), dhidden, workspace)
}

/// [`enqueue`] with any factor for the gradients: `dhidden = scale * d (cross-entropy) / d hidden`, row by row.
///
/// # Errors
/// As [`forward`]; also if there is not one number a row.
pub fn enqueue_scaled(
    hidden: View,
    head: &dyn FrozenWeight,
    targets: &[i64],
    scale: GradScale,
    dhidden: ViewMut,
    workspace: &Workspace,
) -> Result<PendingLoss> {
    enqueue_with(hidden, Table::frozen(head), targets, scale, dhidden, None, workspace)
}

/// [`enqueue_scaled`] with a head that an adapter has parts of: their gradient is added to `gradient`, which is laid out as the
/// adapter's values.
///
/// # Errors
/// As there; also if the adapter's parts do not fit.
pub fn enqueue_with(
    hidden: View,
    head: Table,
    targets: &[i64],
    scale: GradScale,
    dhidden: ViewMut,
    gradient: Option<ViewMut>,
    workspace: &Workspace,
) -> Result<PendingLoss> {
    dhidden.expect(OP, "dhidden", hidden.rows(), hidden.cols())?;
    if let GradScale::PerRow(scales) = scale
        && scales.len() != targets.len()
    {
        let message = format!("{} scales were given for {} rows", scales.len(), targets.len());
        return Err(Error::invalid(OP, message));
    }
    run(hidden, head, targets, Some(Gradients { dhidden, scale, adapter: gradient }), None, workspace)
}

/// The gradients that a pass makes.
pub(crate) struct Gradients<'a> {
    pub(crate) dhidden: ViewMut<'a>,
    pub(crate) scale: GradScale<'a>,
    /// That of the adapter's values, which is added to.
    pub(crate) adapter: Option<ViewMut<'a>>,
}

fn run(
    hidden: View,
    head: Table,
    targets: &[i64],
    mut gradient: Option<Gradients>,
    mut each: Option<&mut [f64]>,
    workspace: &Workspace,
) -> Result<PendingLoss> {
    let (vocab, width) = (head.weight.rows(), head.weight.cols());
    hidden.expect(OP, "hidden", targets.len(), width)?;
    let trained = trained_rows(targets, vocab)?;
    #[cfg(feature = "cuda")]
    if hidden.gpu().is_some() {
        return crate::cuda::loss::run(OP, hidden.cuda(OP)?, head, targets, &trained, gradient, each, workspace);
    }
    if let Some(Gradients { dhidden, .. }) = &mut gradient {
        dhidden.reborrow().host(OP)?.rows_mut().for_each(|row| row.fill(0.0));
    }
    let source = hidden.host(OP)?;
    let mut loss = LossSum { sum: 0.0, trained_tokens: trained.len() };
    let chunk = (CHUNK / vocab.max(1)).max(1);
    for (index, rows) in trained.chunks(chunk).enumerate() {
        let head = head.at_row(index * chunk);
        let mut gathered = workspace.scratch(rows.len(), width);
        for (to, (from, _)) in gathered.as_mut_slice().chunks_exact_mut(width.max(1)).zip(rows) {
            to.copy_from_slice(source.row(*from));
        }
        let mut logits = workspace.scratch(rows.len(), vocab);
        head.logits(gathered.view(), logits.view_mut(), workspace)?;
        let scale = gradient.as_ref().map(|gradient| gradient.scale);
        let losses: Vec<f64> = logits
            .as_mut_slice()
            .par_chunks_exact_mut(vocab)
            .zip_eq(rayon::iter::IntoParallelRefIterator::par_iter(rows))
            .map(|(logits, &(row, target))| cross_entropy(logits, target, scale.map(|scale| scale.of(row))))
            .collect();
        loss.sum += losses.iter().sum::<f64>();
        if let Some(each) = &mut each {
            rows.iter().zip(&losses).for_each(|(&(row, _), &loss)| each[row] = loss);
        }
        if let Some(Gradients { dhidden, adapter, .. }) = &mut gradient {
            workspace.round_gradient(logits.view_mut())?;
            if head.is_frozen() {
                frozen_linear::backward(logits.view(), head.weight, gathered.view_mut(), 0.0, workspace)?;
            } else {
                let mut result = workspace.scratch(rows.len(), width);
                let adapter = adapter.as_mut().map(ViewMut::reborrow);
                head.logits_backward(gathered.view(), logits.view_mut(), result.view_mut(), adapter, workspace)?;
                gathered = result;
            }
            workspace.round_gradient(gathered.view_mut())?;
            let mut dhidden = dhidden.reborrow().host(OP)?;
            for (from, (to, _)) in gathered.as_slice().chunks_exact(width.max(1)).zip(rows) {
                dhidden.row_mut(*to).copy_from_slice(from);
            }
        }
    }
    Ok(PendingLoss::ready(loss))
}

/// The rows with a target, and their targets.
fn trained_rows(targets: &[i64], vocab: usize) -> Result<Vec<(usize, usize)>> {
    let mut rows = Vec::with_capacity(targets.len());
    for (row, &target) in targets.iter().enumerate().filter(|&(_, &target)| target != IGNORE_INDEX) {
        match usize::try_from(target).ok().filter(|&target| target < vocab) {
            Some(target) => rows.push((row, target)),
            None => {
                let message = format!("row {row} has target {target}, the vocabulary has {vocab} tokens");
                return Err(Error::invalid(OP, message));
            }
        }
    }
    Ok(rows)
}

/// The loss of one row; with `scale`, its gradient times `scale` takes the logits' place. A row with NaN has loss NaN.
fn cross_entropy(logits: &mut [f32], target: usize, scale: Option<f32>) -> f64 {
    /// Elements whose exponentials are added in f32 before the sum goes to f64.
    const BLOCK: usize = 1024;
    let mut logits = logits;
    let logit = logits[target];
    let max = vectorize(
        #[inline(always)]
        || {
            let mut lanes = [f32::NEG_INFINITY; 32];
            let (blocks, rest) = logits.as_chunks::<32>();
            for block in blocks {
                for (lane, &x) in lanes.iter_mut().zip(block) {
                    *lane = if x > *lane { x } else { *lane };
                }
            }
            lanes.iter().chain(rest).fold(f32::NEG_INFINITY, |max, &x| if x > max { x } else { max })
        },
    );
    let mut sum = 0f64;
    for block in logits.chunks_mut(BLOCK) {
        let part = vectorize(
            #[inline(always)]
            || {
                let mut lanes = [0f32; 32];
                let (chunks, rest) = block.as_chunks_mut::<32>();
                for chunk in chunks {
                    for (lane, x) in lanes.iter_mut().zip(chunk) {
                        *x = math::exp(*x - max);
                        *lane += *x;
                    }
                }
                let mut tail = 0f32;
                for x in rest {
                    *x = math::exp(*x - max);
                    tail += *x;
                }
                lanes.iter().sum::<f32>() + tail
            },
        );
        sum += f64::from(part);
    }
    if let Some(scale) = scale {
        let factor = (f64::from(scale) / sum) as f32;
        vectorize(
            #[inline(always)]
            || {
                for x in logits.iter_mut() {
                    *x *= factor;
                }
            },
        );
        logits = &mut logits[target..=target];
        logits[0] -= scale;
    }
    sum.ln() + f64::from(max) - f64::from(logit)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Window, assert_close, numeric_gradient, random, to_f64};
    use crate::weight::{PlainData, PlainWeight};

    fn reference(hidden: &[f64], head: &[f64], width: usize, targets: &[i64]) -> f64 {
        let loss = |(row, &target): (&[f64], &i64)| {
            if target < 0 {
                return 0.0;
            }
            let logits: Vec<f64> =
                head.chunks_exact(width).map(|w| w.iter().zip(row).map(|(w, x)| w * x).sum()).collect();
            let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            logits.iter().map(|z| (z - max).exp()).sum::<f64>().ln() + max - logits[target as usize]
        };
        hidden.chunks_exact(width).zip(targets).map(loss).sum()
    }

    #[test]
    fn loss_and_gradient_match_f64() {
        for (tokens, width, vocab) in [(1, 1, 2), (5, 7, 61), (9, 16, 2500), (40, 33, 130)] {
            let mut random = random(tokens as u64);
            let (x, w) = (random(tokens * width), random(vocab * width));
            let targets: Vec<i64> =
                (0..tokens as i64).map(|i| if i % 3 == 2 { IGNORE_INDEX } else { i * 37 % vocab as i64 }).collect();
            let (x64, w64) = (to_f64(&x), to_f64(&w));
            let head = PlainWeight::new(PlainData::F32(w), vocab, width);
            let input = Window::of(&x, tokens, width, 3);
            let want = reference(&x64, &w64, width, &targets);
            let gradient = numeric_gradient(&x64, &[1.0 / 11.0], |x| vec![reference(x, &w64, width, &targets)]);
            let workspace = Workspace::poisoned();
            let mut dx = Window::poisoned(tokens, width, 2);
            let loss = forward_backward(input.view(), &head, &targets, 11, dx.view_mut(), &workspace).unwrap();
            assert!((loss.sum - want).abs() < 1e-6 * want, "{} {want}", loss.sum);
            assert_eq!(loss.trained_tokens, targets.iter().filter(|&&t| t >= 0).count());
            assert_close("dhidden", &dx.to_vec(), &gradient, 2e-6);
            assert_eq!(forward(input.view(), &head, &targets, &workspace).unwrap(), loss);
        }
    }

    #[test]
    fn chunks_do_not_show() {
        // More than CHUNK / vocab trained rows.
        let (tokens, width, vocab) = (70, 2, 300_000);
        let mut random = random(1);
        let (x, w) = (random(tokens * width), random(vocab * width));
        let targets: Vec<i64> = (0..tokens as i64).map(|i| i * 4001).collect();
        let head = PlainWeight::new(PlainData::F32(w), vocab, width);
        let workspace = Workspace::poisoned();
        let mut dx = workspace.matrix(tokens, width).unwrap();
        let view = View::new(&x, tokens, width);
        let loss = forward_backward(view, &head, &targets, 70, dx.view_mut(), &workspace).unwrap();
        assert!(workspace.peak_bytes() < (CHUNK + 1000) * 4);
        let mut sum = 0.0;
        for row in [0, 54, 55, 56, 69] {
            let mut alone = workspace.matrix(1, width).unwrap();
            let one = forward_backward(
                view.slice_rows(row..row + 1),
                &head,
                &targets[row..=row],
                70,
                alone.view_mut(),
                &workspace,
            );
            sum += one.unwrap().sum;
            // Each element is a sum over 300,000 terms of both signs, in another order.
            assert_close("row", alone.as_slice(), &to_f64(&dx.as_slice()[row * width..(row + 1) * width]), 1e-3);
        }
        assert!(loss.sum > sum);
    }

    #[test]
    fn each_row_has_its_loss_and_its_scale() {
        let (tokens, width, vocab) = (9, 5, 31);
        let mut random = random(3);
        let (x, w) = (random(tokens * width), random(vocab * width));
        let targets: Vec<i64> =
            (0..tokens as i64).map(|i| if i % 4 == 1 { IGNORE_INDEX } else { i * 7 % vocab as i64 }).collect();
        let scales: Vec<f32> = (0..tokens).map(|i| 0.5 - 0.25 * i as f32).collect();
        let head = PlainWeight::new(PlainData::F32(w), vocab, width);
        let (view, workspace) = (View::new(&x, tokens, width), Workspace::poisoned());
        let losses = token_losses(view, &head, &targets, &workspace).unwrap();
        let sum = forward(view, &head, &targets, &workspace).unwrap().sum;
        assert!((losses.iter().sum::<f64>() - sum).abs() < 1e-12 * sum);
        let gradient = |scale: GradScale| {
            let mut dx = Window::poisoned(tokens, width, 1);
            enqueue_scaled(view, &head, &targets, scale, dx.view_mut(), &workspace).unwrap().wait().unwrap();
            dx.to_vec()
        };
        let (each, one) = (gradient(GradScale::PerRow(&scales)), gradient(GradScale::Uniform(1.0)));
        for (row, &target) in targets.iter().enumerate() {
            let range = row * width..(row + 1) * width;
            let expected: Vec<f64> = one[range.clone()].iter().map(|&d| f64::from(d * scales[row])).collect();
            assert_close("row", &each[range.clone()], &expected, 2e-6);
            assert_eq!(losses[row] == 0.0, target == IGNORE_INDEX, "row {row}");
        }
        assert_eq!(gradient(GradScale::PerRow(&[0.25; 9])), gradient(GradScale::Uniform(0.25)), "the same bits");
        let mut dx = Window::poisoned(tokens, width, 1);
        let error = enqueue_scaled(view, &head, &targets, GradScale::PerRow(&scales[1..]), dx.view_mut(), &workspace);
        assert_eq!(error.unwrap_err().to_string(), "linear_cross_entropy: 8 scales were given for 9 rows");
    }

    #[test]
    fn large_logits_do_not_overflow_and_nan_shows() {
        let head = PlainWeight::new(PlainData::F32(vec![1.0, 0.0]), 2, 1);
        let workspace = Workspace::poisoned();
        let loss = |x: f32| forward(View::new(&[x], 1, 1), &head, &[1], &workspace).unwrap().sum;
        assert_eq!(loss(1000.0), 1000.0);
        assert_eq!(loss(-1000.0), 0.0);
        assert!(loss(f32::NAN).is_nan());
    }

    #[test]
    fn a_target_outside_the_vocabulary_is_named() {
        let head = PlainWeight::new(PlainData::F32(vec![1.0; 6]), 3, 2);
        for target in [3, -1, i64::MIN] {
            let error = forward(View::new(&[0.0; 4], 2, 2), &head, &[0, target], &Workspace::poisoned()).unwrap_err();
            let expected = format!("linear_cross_entropy: row 1 has target {target}, the vocabulary has 3 tokens");
            assert_eq!(error.to_string(), expected);
        }
    }

    #[test]
    fn nothing_trained_costs_nothing() {
        let head = PlainWeight::new(PlainData::F32(vec![1.0; 6]), 3, 2);
        let mut dx = [f32::NAN; 4];
        let (hidden, out) = (View::new(&[1.0; 4], 2, 2), ViewMut::new(&mut dx, 2, 2));
        let loss = forward_backward(hidden, &head, &[IGNORE_INDEX; 2], 0, out, &Workspace::poisoned()).unwrap();
        assert_eq!((loss, dx), (LossSum::default(), [0.0; 4]));
    }
}
