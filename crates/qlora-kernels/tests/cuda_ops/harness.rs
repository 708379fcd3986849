//! One piece of code that runs on either side, and the comparison of what it gives.

use std::cell::RefCell;
use std::sync::{Arc, OnceLock};

use candle_core::Device;
use half::{bf16, f16};
use qlora_kernels::cuda::{self, CudaWeight, Gpu};
use qlora_kernels::quant::{QuantConfig, Quantized4bit};
use qlora_kernels::weight::{FrozenWeight, PlainData, PlainWeight};
use qlora_kernels::{Dtype, Matrix, Result, View, ViewMut, Workspace};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// The types of activations on a GPU.
pub(crate) const DTYPES: [Dtype; 3] = [Dtype::F32, Dtype::Bf16, Dtype::F16];

/// Those that a device computes in: all, but no bf16 before Ampere, or where the environment lowers its limits.
pub(crate) fn dtypes(device: &Device) -> Vec<Dtype> {
    let gpu = Gpu::of(device).unwrap();
    DTYPES.into_iter().filter(|dtype| gpu.check_dtype("tests", *dtype).is_ok()).collect()
}

/// Those of 16 bits.
pub(crate) fn halves(device: &Device) -> Vec<Dtype> {
    dtypes(device).into_iter().filter(|dtype| *dtype != Dtype::F32).collect()
}

/// bf16, or f16 where there is none.
pub(crate) fn half(device: &Device) -> Dtype {
    halves(device)[0]
}

/// Elements before and after every row of a window: none, one that breaks alignment, one that keeps it.
pub(crate) const GAPS: [usize; 3] = [0, 3, 8];

/// A device of its own, or `None` with a printed reason where there is no GPU.
///
/// # Panics
/// If there is no GPU although `QLORA_REQUIRE_GPU=1`.
pub(crate) fn new_gpu() -> Option<Device> {
    match cuda::device(0, None) {
        Ok(device) => Some(device),
        Err(error) if std::env::var("QLORA_REQUIRE_GPU").is_ok_and(|value| value == "1") => panic!("no GPU: {error}"),
        Err(error) => {
            println!("skipped: no GPU ({error})");
            None
        }
    }
}

/// The device that the tests share.
pub(crate) fn gpu() -> Option<Device> {
    static DEVICE: OnceLock<Option<Device>> = OnceLock::new();
    let device = DEVICE.get_or_init(new_gpu).clone();
    if device.is_none() {
        println!("skipped: no GPU");
    }
    device
}

/// The relative error that an element type allows, for outputs that are sums of rounded products.
pub(crate) fn tolerance(dtype: Dtype) -> f64 {
    match dtype {
        Dtype::F32 => 1e-5,
        Dtype::F16 => 2e-3,
        Dtype::Bf16 => 1e-2,
    }
}

/// `x` rounded to `dtype`.
pub(crate) fn round(x: f32, dtype: Dtype) -> f32 {
    match dtype {
        Dtype::F32 => x,
        Dtype::Bf16 => bf16::from_f32(x).to_f32(),
        Dtype::F16 => f16::from_f32(x).to_f32(),
    }
}

/// A number of mean 0 and variance 1, nearly normal: the sum of four uniform ones (there are many to make).
pub(crate) fn normal(rng: &mut ChaCha8Rng) -> f32 {
    let bits: u64 = rng.random();
    let sum: u64 = (0..4).map(|lane| bits >> (16 * lane) & 0xffff).sum();
    (sum as f32 / 65_536.0 - 2.0) * 3f32.sqrt()
}

/// Elements in the precision they are stored in.
pub(crate) fn plain(values: &[f32], dtype: Dtype) -> PlainData {
    match dtype {
        Dtype::F32 => PlainData::F32(values.to_vec()),
        Dtype::Bf16 => PlainData::Bf16(values.iter().map(|&x| bf16::from_f32(x)).collect()),
        Dtype::F16 => PlainData::F16(values.iter().map(|&x| f16::from_f32(x)).collect()),
    }
}

/// The storage of a frozen weight.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Kind {
    Plain(Dtype),
    Bits4(QuantConfig),
}

/// The device that runs a case. Two sides made with the same seed hand out the same inputs in the same order.
pub(crate) struct Side {
    pub(crate) workspace: Workspace,
    inputs: Dtype,
    rng: RefCell<ChaCha8Rng>,
}

impl Side {
    pub(crate) fn cpu(inputs: Dtype, seed: u64) -> Self {
        Self { workspace: Workspace::poisoned(), inputs, rng: RefCell::new(ChaCha8Rng::seed_from_u64(seed)) }
    }

    pub(crate) fn gpu(device: &Device, dtype: Dtype, seed: u64) -> Self {
        let workspace = Workspace::poisoned_on(device, dtype).unwrap();
        Self { workspace, inputs: dtype, rng: RefCell::new(ChaCha8Rng::seed_from_u64(seed)) }
    }

    pub(crate) fn is_gpu(&self) -> bool {
        self.workspace.gpu().is_some()
    }

    /// Normal random numbers that the activations' type holds exactly.
    pub(crate) fn values(&self, len: usize, scale: f32) -> Vec<f32> {
        let mut rng = self.rng.borrow_mut();
        (0..len).map(|_| round(scale * normal(&mut rng), self.inputs)).collect()
    }

    /// Normal random numbers in full precision.
    pub(crate) fn values_f32(&self, len: usize, scale: f32) -> Vec<f32> {
        let mut rng = self.rng.borrow_mut();
        (0..len).map(|_| scale * normal(&mut rng)).collect()
    }

    /// A random activation, `gap` elements around each row.
    pub(crate) fn input(&self, rows: usize, cols: usize, gap: usize) -> Window {
        self.scaled_input(rows, cols, gap, 1.0)
    }

    pub(crate) fn scaled_input(&self, rows: usize, cols: usize, gap: usize, scale: f32) -> Window {
        self.window_of(&self.values(rows * cols, scale), rows, cols, gap)
    }

    pub(crate) fn window_of(&self, values: &[f32], rows: usize, cols: usize, gap: usize) -> Window {
        let mut window = self.output(rows, cols, gap);
        window.view_mut().copy_from(View::new(values, rows, cols)).unwrap();
        window
    }

    /// An activation of NaN.
    pub(crate) fn output(&self, rows: usize, cols: usize, gap: usize) -> Window {
        let matrix = self.workspace.matrix(rows, gap + cols + gap).unwrap();
        Window { matrix, gap, cols }
    }

    /// A random activation in a matrix with a margin (on the GPU).
    pub(crate) fn with_margin(&self, rows: usize, cols: usize, margin: usize) -> Matrix {
        let mut matrix = self.workspace.with_margin(rows, cols, margin).unwrap();
        matrix.view_mut().copy_from(View::new(&self.values(rows * cols, 1.0), rows, cols)).unwrap();
        matrix
    }

    /// A random f32 vector around `center`: norm weights, biases, adapters.
    pub(crate) fn vector(&self, len: usize, center: f32, scale: f32) -> Matrix {
        let values: Vec<f32> = self.values_f32(len, scale).iter().map(|x| center + x).collect();
        self.workspace.upload(&values, 1, len).unwrap()
    }

    /// An f32 vector of NaN.
    pub(crate) fn vector_output(&self, len: usize) -> Matrix {
        self.workspace.matrix_f32(1, len).unwrap()
    }

    /// A random frozen weight, scaled so that products with it stay near 1.
    pub(crate) fn weight(&self, kind: Kind, rows: usize, cols: usize) -> Arc<dyn FrozenWeight> {
        let values = self.values_f32(rows * cols, 1.0 / (cols as f32).sqrt());
        match kind {
            Kind::Plain(dtype) => {
                // A weight in more bits than the activations is rounded on the GPU.
                let values: Vec<f32> = values.iter().map(|&x| round(x, self.inputs)).collect();
                let weight = PlainWeight::new(plain(&values, dtype), rows, cols);
                match self.is_gpu() {
                    true => Arc::new(CudaWeight::plain(&weight, &self.workspace).unwrap()),
                    false => Arc::new(weight),
                }
            }
            Kind::Bits4(config) => {
                let weight = Quantized4bit::quantize(&PlainData::F32(values), rows, cols, &config).unwrap();
                match self.is_gpu() {
                    true => Arc::new(CudaWeight::quantized(&weight, &self.workspace).unwrap()),
                    false => Arc::new(weight),
                }
            }
        }
    }
}

/// Columns in the middle of a wider matrix of NaN.
pub(crate) struct Window {
    matrix: Matrix,
    gap: usize,
    cols: usize,
}

impl Window {
    pub(crate) fn view(&self) -> View<'_> {
        self.matrix.view().slice_cols(self.gap..self.gap + self.cols)
    }

    pub(crate) fn view_mut(&mut self) -> ViewMut<'_> {
        self.matrix.view_mut().slice_cols(self.gap..self.gap + self.cols)
    }

    /// The elements, after a check that nothing around them was written.
    pub(crate) fn to_vec(&self) -> Vec<f32> {
        let mut inside = Vec::new();
        for row in self.matrix.to_vec().unwrap().chunks_exact((self.cols + 2 * self.gap).max(1)) {
            let (left, right) = (&row[..self.gap], &row[self.gap + self.cols..]);
            assert!(left.iter().chain(right).all(|x| x.is_nan()), "an element beside the window was written");
            inside.extend_from_slice(&row[self.gap..self.gap + self.cols]);
        }
        inside
    }
}

/// One result of a case.
pub(crate) struct Output {
    name: &'static str,
    values: Vec<f64>,
    /// Instead of the type's.
    tolerance: Option<f64>,
}

impl Output {
    pub(crate) fn name(&self) -> &'static str {
        self.name
    }

    /// The values, all of which came from f32.
    pub(crate) fn to_f32(&self) -> Vec<f32> {
        self.values.iter().map(|&x| x as f32).collect()
    }
}

/// A result of the activations' type.
pub(crate) fn output(name: &'static str, values: Vec<f32>) -> Output {
    Output { name, values: values.into_iter().map(f64::from).collect(), tolerance: None }
}

/// A result with a tolerance of its own; 0 for the same bits.
pub(crate) fn within(name: &'static str, tolerance: f64, values: Vec<f32>) -> Output {
    Output { tolerance: Some(tolerance), ..output(name, values) }
}

/// A number, such as a loss.
pub(crate) fn number(name: &'static str, value: f64) -> Output {
    Output { name, values: vec![value], tolerance: None }
}

/// `norm(got - want) / norm(want)`; NaN if anything is NaN, infinite if something is there that should be 0.
pub(crate) fn relative_error(got: &[f64], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len(), "the sides give results of different sizes");
    let difference = got.iter().zip(want).map(|(got, want)| (got - want).powi(2)).sum::<f64>().sqrt();
    let norm = want.iter().map(|want| want * want).sum::<f64>().sqrt();
    if difference == 0.0 { 0.0 } else { difference / norm }
}

/// Collects the cases of a test: all are run, all failures are shown.
pub(crate) struct Report {
    name: &'static str,
    cases: usize,
    failures: Vec<String>,
    worst: Vec<(Dtype, &'static str, f64)>,
    tolerance: fn(Dtype) -> f64,
}

impl Report {
    pub(crate) fn new(name: &'static str) -> Self {
        Self::with_tolerance(name, tolerance)
    }

    pub(crate) fn with_tolerance(name: &'static str, tolerance: fn(Dtype) -> f64) -> Self {
        Self { name, cases: 0, failures: Vec::new(), worst: Vec::new(), tolerance }
    }

    /// Runs `case` on the CPU and on `device` with activations of `dtype`, and compares all outputs.
    pub(crate) fn compare(
        &mut self,
        device: &Device,
        dtype: Dtype,
        label: &str,
        case: impl Fn(&Side) -> Result<Vec<Output>>,
    ) {
        self.cases += 1;
        let seed = self.cases as u64;
        let want = case(&Side::cpu(dtype, seed)).unwrap_or_else(|error| panic!("{label} on the CPU: {error}"));
        let got = match case(&Side::gpu(device, dtype, seed)) {
            Ok(got) => got,
            Err(error) => return self.fail(dtype, label, &error.to_string()),
        };
        assert_eq!(got.len(), want.len());
        for (got, want) in got.iter().zip(&want) {
            let error = relative_error(&got.values, &want.values);
            let limit = got.tolerance.unwrap_or((self.tolerance)(dtype));
            match self.worst.iter_mut().find(|(d, name, _)| (*d, *name) == (dtype, got.name)) {
                None => self.worst.push((dtype, got.name, error)),
                Some((_, _, worst)) if error > *worst || error.is_nan() => *worst = error,
                Some(_) => {}
            }
            let passes = error <= limit;
            if !passes {
                let at = got.values.iter().zip(&want.values).position(|(g, w)| {
                    let close = (g - w).abs() <= limit * w.abs().max(1e-30);
                    !close
                });
                let at = at.map(|i| format!(", from element {i}: {} instead of {}", got.values[i], want.values[i]));
                let what = format!("{} is off by {error:.2e} > {limit:.0e}{}", got.name, at.unwrap_or_default());
                self.fail(dtype, label, &what);
            }
        }
    }

    /// Records a check of another kind.
    pub(crate) fn check(&mut self, dtype: Dtype, label: &str, passes: bool, what: &str) {
        self.cases += 1;
        if !passes {
            self.fail(dtype, label, what);
        }
    }

    fn fail(&mut self, dtype: Dtype, label: &str, what: &str) {
        self.failures.push(format!("  {} {}: {what}", dtype.name(), label));
    }

    /// # Panics
    /// If any case failed.
    pub(crate) fn finish(self) {
        for dtype in DTYPES {
            let errors: Vec<String> = (self.worst.iter().filter(|(d, ..)| *d == dtype))
                .map(|(_, name, error)| format!("{name} {error:.1e}"))
                .collect();
            if !errors.is_empty() {
                println!("{} {}: largest errors: {}", self.name, dtype.name(), errors.join(", "));
            }
        }
        let (failed, cases) = (self.failures.len(), self.cases);
        let shown = self.failures.iter().take(40).cloned().collect::<Vec<_>>().join("\n");
        assert!(failed == 0, "{}: {failed} failures in {cases} cases\n{shown}", self.name);
        println!("{}: {cases} cases", self.name);
    }
}

/// Whether all bits are the same.
pub(crate) fn same_bits(a: &[f32], b: &[f32]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits())
}

#[test]
fn the_comparison_notices_what_it_is_for() {
    assert!(relative_error(&[1.0, f64::NAN], &[1.0, 1.0]).is_nan());
    assert!(relative_error(&[1.0, 1.0], &[1.0, f64::NAN]).is_nan());
    assert_eq!(relative_error(&[0.1], &[0.0]), f64::INFINITY);
    assert_eq!(relative_error(&[3.0, 4.5], &[3.0, 4.0]), 0.1);
    assert_eq!(relative_error(&[0.0], &[0.0]), 0.0);
}
