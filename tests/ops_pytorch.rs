//! The operations against what PyTorch and transformers computed (`scripts/fixtures/ops.py`), forward and backward.

use std::collections::HashMap;
use std::path::PathBuf;

use candle_core::Device;
use qlora::kernels::ops::adamw::AdamW;
use qlora::kernels::ops::dropout::Dropout;
use qlora::kernels::ops::rope::{RopeConfig, RopeScaling, RopeTable};
use qlora::kernels::ops::{adamw, embedding, grad_norm, lora_linear, rms_norm, rope, swiglu};
use qlora::kernels::sequence::Positions;
use qlora::kernels::weight::{PlainData, PlainWeight};
use qlora::kernels::{View, ViewMut, Workspace};
use safetensors::{Dtype, SafeTensors};

fn fixture_path(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/ops").join(name)
}

/// A fixture file; integers are read as f64, too.
struct Fixture {
    tensors: HashMap<String, (Vec<usize>, Vec<f64>)>,
}

impl Fixture {
    fn open(name: &str) -> Self {
        let bytes = std::fs::read(fixture_path(&format!("{name}.safetensors"))).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let tensors = file.iter().map(|(name, view)| {
            let data = view.data();
            let data = match view.dtype() {
                Dtype::F32 => data.as_chunks().0.iter().map(|b| f64::from(f32::from_le_bytes(*b))).collect(),
                Dtype::F64 => data.as_chunks().0.iter().map(|b| f64::from_le_bytes(*b)).collect(),
                Dtype::I64 => data.as_chunks().0.iter().map(|b| i64::from_le_bytes(*b) as f64).collect(),
                dtype => panic!("{name} is {dtype}"),
            };
            (name.to_string(), (view.shape().to_vec(), data))
        });
        Self { tensors: tensors.collect() }
    }

    fn f64(&self, name: &str) -> &[f64] {
        &self.tensors.get(name).unwrap_or_else(|| panic!("no tensor {name}")).1
    }

    fn f32(&self, name: &str) -> Vec<f32> {
        self.f64(name).iter().map(|&x| x as f32).collect()
    }

    fn matrix(&self, name: &str) -> Matrix {
        let [rows, cols] = self.tensors[name].0[..] else { panic!("{name} is no matrix") };
        Matrix { data: self.f32(name), rows, cols }
    }

    /// The names of the cases: the part of the tensors' names before the last dot.
    fn cases(&self) -> Vec<&str> {
        let mut cases: Vec<_> = self.tensors.keys().map(|name| name.rsplit_once('.').unwrap().0).collect();
        cases.sort_unstable();
        cases.dedup();
        assert!(!cases.is_empty());
        cases
    }
}

#[derive(Clone)]
struct Matrix {
    data: Vec<f32>,
    rows: usize,
    cols: usize,
}

impl Matrix {
    fn poisoned(rows: usize, cols: usize) -> Self {
        Self { data: vec![f32::NAN; rows * cols], rows, cols }
    }

    fn zeros(rows: usize, cols: usize) -> Self {
        Self { data: vec![0.0; rows * cols], rows, cols }
    }

    fn like(&self) -> Self {
        Self::poisoned(self.rows, self.cols)
    }

    fn view(&self) -> View<'_> {
        View::new(&self.data, self.rows, self.cols)
    }

    fn view_mut(&mut self) -> ViewMut<'_> {
        ViewMut::new(&mut self.data, self.rows, self.cols)
    }
}

/// The largest `|got - want| / (|want| + rms(want))`, printed and checked.
#[track_caller]
fn assert_close(what: &str, got: &[f32], want: &[f64], tolerance: f64) {
    assert_eq!(got.len(), want.len(), "{what}");
    let rms = (want.iter().map(|x| x * x).sum::<f64>() / want.len() as f64).sqrt();
    let errors = got.iter().zip(want).map(|(&got, want)| match (f64::from(got) - want).abs() {
        0.0 => 0.0,
        difference => difference / (want.abs() + rms),
    });
    let worst = errors.fold(0.0, |worst, e| if e.is_nan() || e > worst { e } else { worst });
    println!("{what}: {worst:.1e}");
    assert!(worst <= tolerance, "{what}: relative error {worst:.2e} > {tolerance:.0e}");
}

#[test]
fn rms_norm_is_that_of_transformers() {
    const EPS: f32 = 1e-5;
    let fixture = Fixture::open("rms_norm");
    for case in fixture.cases() {
        let [x, dy, delta] = ["x", "dy", "delta"].map(|name| fixture.matrix(&format!("{case}.{name}")));
        let weight = fixture.f32(&format!("{case}.weight"));
        let (mut y, mut rstd) = (x.like(), vec![f32::NAN; x.rows]);
        rms_norm::forward(x.view(), &weight, EPS, y.view_mut(), &mut rstd).unwrap();
        assert_close(&format!("rms_norm {case} y"), &y.data, fixture.f64(&format!("{case}.y")), 1e-6);
        let mut dx = x.like();
        rms_norm::backward(x.view(), &weight, &rstd, dy.view(), dx.view_mut(), false).unwrap();
        assert_close(&format!("rms_norm {case} dx"), &dx.data, fixture.f64(&format!("{case}.dx")), 2e-6);
        let (mut sum, mut y) = (x.clone(), x.like());
        rms_norm::forward_residual(sum.view_mut(), delta.view(), &weight, EPS, y.view_mut(), &mut rstd).unwrap();
        let want = fixture.f64(&format!("{case}.y_residual"));
        assert_close(&format!("rms_norm {case} y with residual"), &y.data, want, 1e-6);
    }
}

fn rope_config(case: &serde_json::Value) -> RopeConfig {
    let number = |key: &str| case[key].as_f64().unwrap_or_else(|| panic!("{key} in {case}"));
    let or = |key: &str, default: f64| case[key].as_f64().unwrap_or(default);
    let original_max_position_embeddings = or("original_max_position_embeddings", 0.0) as usize;
    let scaling = match case["rope_type"].as_str().unwrap() {
        "default" => None,
        "linear" => Some(RopeScaling::Linear { factor: number("factor") }),
        "llama3" => Some(RopeScaling::Llama3 {
            factor: number("factor"),
            low_freq_factor: number("low_freq_factor"),
            high_freq_factor: number("high_freq_factor"),
            original_max_position_embeddings,
        }),
        "yarn" => Some(RopeScaling::Yarn {
            factor: number("factor"),
            original_max_position_embeddings,
            beta_fast: or("beta_fast", 32.0),
            beta_slow: or("beta_slow", 1.0),
            attention_factor: case["given_attention_factor"].as_f64(),
            truncate: case["truncate"].as_bool().unwrap_or(true),
        }),
        other => panic!("{other}"),
    };
    RopeConfig { theta: number("rope_theta"), scaling }
}

#[test]
fn rope_is_that_of_transformers() {
    let json: serde_json::Value = serde_json::from_slice(&std::fs::read(fixture_path("rope.json")).unwrap()).unwrap();
    let positions: Vec<u32> = serde_json::from_value(json["positions"].clone()).unwrap();
    let positions: Positions = positions.into();
    let fixture = Fixture::open("rope");
    for case in json["cases"].as_array().unwrap() {
        let name = case["name"].as_str().unwrap();
        let tensor = |what: &str| format!("{name}.{what}");
        let head_dim = case["head_dim"].as_u64().unwrap() as usize;
        let table = RopeTable::new(&rope_config(case), head_dim, 8192).unwrap();
        assert_eq!(f64::from(table.attention_factor()), case["attention_factor"].as_f64().unwrap() as f32 as f64);

        // PyTorch's power is not correctly rounded: single frequencies differ in their last bit.
        let want = fixture.f32(&tensor("inv_freq"));
        let unequal = want.iter().zip(table.inverse_frequencies()).filter(|(a, b)| a != b).count();
        for (a, b) in want.iter().zip(table.inverse_frequencies()) {
            assert!(a.to_bits().abs_diff(b.to_bits()) <= 1, "{name}: {a} {b}");
        }
        println!("rope {name}: {unequal} of {} frequencies differ", want.len());
        assert!(unequal * 50 <= want.len(), "{name}: {unequal} of {} frequencies differ", want.len());

        let mut worst = [0f64; 2];
        for (row, &position) in positions.iter().enumerate() {
            let position = position as usize;
            for (what, got) in [table.cos(position), table.sin(position)].into_iter().enumerate() {
                let want = &fixture.f64(&tensor(["cos", "sin"][what]))[row * head_dim / 2..][..head_dim / 2];
                let errors = got.iter().zip(want).map(|(&got, want)| (f64::from(got) - want).abs());
                worst[what] = errors.fold(worst[what], f64::max);
            }
        }
        println!("rope {name}: largest difference of cos {:.1e}, sin {:.1e}", worst[0], worst[1]);
        // One such frequency is so high (84 radians at position 8191) that its last bit moves the angle by 7e-6.
        let limit = if name == "qwen3" { 1e-5 } else { 1e-6 };
        assert!(worst[0] <= limit && worst[1] <= limit, "{name}: {worst:?}");
        let limit = 2.0 * limit;

        let mut y = fixture.matrix(&tensor("x"));
        rope::forward(y.view_mut(), head_dim, &table, &positions).unwrap();
        assert_close(&format!("rope {name} y"), &y.data, fixture.f64(&tensor("y")), limit);
        let mut dx = fixture.matrix(&tensor("dy"));
        rope::backward(dx.view_mut(), head_dim, &table, &positions).unwrap();
        assert_close(&format!("rope {name} dx"), &dx.data, fixture.f64(&tensor("dx")), limit);
    }
}

#[test]
fn swiglu_is_that_of_pytorch() {
    let fixture = Fixture::open("swiglu");
    for case in fixture.cases() {
        let [mut gate, mut up, dh] = ["gate", "up", "dh"].map(|name| fixture.matrix(&format!("{case}.{name}")));
        let (mut h, mut h_again) = (gate.like(), gate.like());
        swiglu::forward(gate.view(), up.view(), h.view_mut()).unwrap();
        swiglu::backward(gate.view_mut(), up.view_mut(), dh.view(), Some(h_again.view_mut())).unwrap();
        for (what, got) in [("h", h), ("h", h_again), ("dgate", gate), ("dup", up)] {
            assert_close(&format!("swiglu {case} {what}"), &got.data, fixture.f64(&format!("{case}.{what}")), 2e-6);
        }
    }
}

#[test]
fn embedding_is_that_of_pytorch() {
    let fixture = Fixture::open("embedding");
    let (table, want) = (fixture.matrix("table"), fixture.matrix("y"));
    let tokens: Vec<u32> = fixture.f64("tokens").iter().map(|&id| id as u32).collect();
    let mut y = want.like();
    let table = PlainWeight::new(PlainData::F32(table.data), table.rows, table.cols);
    embedding::forward(&tokens, &table, y.view_mut()).unwrap();
    assert_eq!(y.data, want.data);
}

#[test]
fn lora_linear_is_that_of_pytorch_with_the_same_mask() {
    let fixture = Fixture::open("lora_linear");
    let workspace = Workspace::new(&Device::Cpu).unwrap();
    for case in fixture.cases() {
        let tensor = |what: &str| format!("{case}.{what}");
        let [x, a, b, mut y, dy] = ["x", "a", "b", "base", "dy"].map(|name| fixture.matrix(&tensor(name)));
        let &[scale, p] = &fixture.f32(&tensor("scale_and_p"))[..] else { panic!() };
        let dropout = Some(Dropout { p, seed: 42, stream: x.rows as u64, first_row: 0 });
        let mut s = Matrix::poisoned(x.rows, a.rows);
        let (x, a, b, dy) = (x.view(), a.view(), b.view(), dy.view());
        lora_linear::forward(x, a, b, scale, dropout, s.view_mut(), y.view_mut(), &workspace).unwrap();
        let [mut dx, mut da, mut db] = [x, a, b].map(|view| Matrix::zeros(view.rows(), view.cols()));
        let (dx_mut, da_mut, db_mut) = (dx.view_mut(), da.view_mut(), db.view_mut());
        lora_linear::backward(x, a, b, scale, dropout, s.view(), dy, Some(dx_mut), da_mut, db_mut, &workspace).unwrap();
        for (what, got) in [("y", y), ("dx", dx), ("da", da), ("db", db)] {
            assert_close(&format!("lora_linear {case} {what}"), &got.data, fixture.f64(&tensor(what)), 2e-6);
        }
    }
}

#[test]
fn adamw_follows_pytorch_for_20_steps() {
    let fixture = Fixture::open("adamw");
    for case in fixture.cases() {
        let tensor = |what: &str| format!("{case}.{what}");
        let mut param = fixture.f32(&tensor("param"));
        let (grads, params) = (fixture.matrix(&tensor("grads")), fixture.f64(&tensor("params")));
        let rates = fixture.f64(&tensor("rates"));
        let &[beta1, beta2, eps, weight_decay] = fixture.f64(&tensor("settings")) else { panic!() };
        let (mut m, mut v) = (vec![0.0; param.len()], vec![0.0; param.len()]);
        assert_eq!(grads.rows, 20);
        for (i, &lr) in rates.iter().enumerate() {
            let config = AdamW { lr, beta1, beta2, eps, weight_decay };
            let grad = &grads.data[i * grads.cols..][..grads.cols];
            adamw::step(&config, i as u64 + 1, 1.0, &mut param, grad, &mut m, &mut v).unwrap();
            let want = &params[i * grads.cols..][..grads.cols];
            assert_close(&format!("adamw {case} param after step {}", i + 1), &param, want, 1e-6);
        }
        // Element by element, for their scales lie 11 and 22 powers of ten apart. The sum of gradients of both signs that
        // m is cannot be more precise than its terms.
        let column = |i: usize| grads.data.iter().skip(i).step_by(grads.cols);
        for (i, (&got, want)) in m.iter().zip(fixture.f64(&tensor("m"))).enumerate() {
            let largest = column(i).fold(0f64, |largest, g| largest.max(f64::from(g.abs())));
            assert!((f64::from(got) - want).abs() <= 2e-7 * largest, "{case} m: {got} {want}");
        }
        for (&got, want) in v.iter().zip(fixture.f64(&tensor("v"))) {
            assert!((f64::from(got) - want).abs() <= 1e-6 * want, "{case} v: {got} {want}");
        }
    }
}

#[test]
fn clipping_is_that_of_pytorch() {
    let fixture = Fixture::open("grad_norm");
    for case in fixture.cases() {
        let tensor = |what: &str| format!("{case}.{what}");
        let mut grad = fixture.f32(&tensor("grad"));
        let norm = grad_norm::global_norm(&grad).unwrap();
        assert_close(&format!("grad_norm {case}"), &[norm as f32], fixture.f64(&tensor("norm")), 3e-7);
        let coefficient = grad_norm::clip_coefficient(norm, fixture.f64(&tensor("max_norm"))[0]);
        grad.iter_mut().for_each(|x| *x *= coefficient);
        assert_close(&format!("clipped {case}"), &grad, fixture.f64(&tensor("clipped")), 5e-7);
    }
}
