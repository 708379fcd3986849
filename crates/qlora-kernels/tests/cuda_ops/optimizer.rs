//! AdamW, the gradient's norm, and the search for values that are not finite.

use qlora_kernels::Dtype;
use qlora_kernels::ops::adamw::{self, AdamW};
use qlora_kernels::ops::adamw_8bit::{self, Moments8bit};
use qlora_kernels::ops::grad_norm;

use crate::harness::{Report, Side, gpu, number, output};

const LENGTHS: [usize; 7] = [1, 7, 128, 1000, 4097, 100_003, 3_000_001];

#[test]
fn adamw_agrees_with_the_cpu() {
    let Some(device) = gpu() else { return };
    let mut report = Report::with_tolerance("adamw", |_| 1e-6);
    let config = AdamW { lr: 3e-3, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.1 };
    for len in LENGTHS {
        report.compare(&device, Dtype::F32, &format!("{len} elements"), |side| {
            let mut param = side.vector(len, 0.0, 1.0);
            let (mut m, mut v) = (side.workspace.zeros_f32(1, len)?, side.workspace.zeros_f32(1, len)?);
            for (step, scale) in [(1, 1.0), (2, 0.3), (3, 1.0), (1000, 0.01)] {
                let grad = side.vector(len, 0.0, 0.1);
                adamw::step(&config, step, scale, param.view_mut(), grad.view(), m.view_mut(), v.view_mut())?;
            }
            Ok(vec![output("param", param.to_vec()?), output("m", m.to_vec()?), output("v", v.to_vec()?)])
        });
    }
    report.finish();
}

#[test]
fn adamw_with_8_bit_moments_gives_the_bits_of_the_cpu() {
    let Some(device) = gpu() else { return };
    let config = AdamW { lr: 3e-3, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.1 };
    for len in LENGTHS {
        let run = |side: Side| {
            let mut param = side.vector(len, 0.0, 1.0);
            let mut moments = Moments8bit::new(len, &side.workspace).unwrap();
            for (step, scale) in [(1, 1.0), (2, 0.3), (3, 1.0), (1000, 0.01)] {
                let grad = side.vector(len, 0.0, 0.1);
                adamw_8bit::step(&config, step, scale, param.view_mut(), grad.view(), &mut moments).unwrap();
            }
            let bits: Vec<u32> = param.to_vec().unwrap().iter().map(|x| x.to_bits()).collect();
            (bits, moments.to_host().unwrap())
        };
        let (on_gpu, on_cpu) = (run(Side::gpu(&device, Dtype::F32, 1)), run(Side::cpu(Dtype::F32, 1)));
        let differ = |a: &[u8], b: &[u8]| a.iter().zip(b).filter(|(a, b)| a != b).count();
        let codes = [differ(&on_gpu.1.exp_avg, &on_cpu.1.exp_avg), differ(&on_gpu.1.exp_avg_sq, &on_cpu.1.exp_avg_sq)];
        println!("adamw_8bit, {len} elements: {codes:?} codes differ");
        assert!(on_gpu == on_cpu, "{len} elements");
    }
}

#[test]
fn the_norm_agrees_with_the_cpu() {
    let Some(device) = gpu() else { return };
    let mut report = Report::with_tolerance("grad_norm", |_| 1e-12);
    for len in LENGTHS {
        for scale in [1.0, 1e-30, 1e30] {
            report.compare(&device, Dtype::F32, &format!("{len} elements of {scale:e}"), |side| {
                let grad = side.vector(len, 0.0, scale);
                let first = grad_norm::global_norm(grad.view())?;
                assert_eq!(first.to_bits(), grad_norm::global_norm(grad.view())?.to_bits(), "two runs differ");
                Ok(vec![number("norm", first)])
            });
        }
    }
    report.finish();
}

#[test]
fn the_first_value_that_is_not_finite_is_found() {
    let Some(device) = gpu() else { return };
    let side = Side::gpu(&device, Dtype::F32, 1);
    for len in LENGTHS {
        let values = side.values(len, 1e30);
        let search = |values: &[f32]| {
            let vector = side.workspace.upload(values, 1, len).unwrap();
            (grad_norm::first_non_finite(vector.view()).unwrap(), grad_norm::global_norm(vector.view()).unwrap())
        };
        let (first, norm) = search(&values);
        assert!(first.is_none() && norm.is_finite());
        for at in [0, len / 3, len / 2, len - 1] {
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let mut values = values.clone();
                values[at] = bad;
                values[len - 1] = bad;
                let (first, norm) = search(&values);
                assert_eq!(first, Some(at), "{bad} among {len}");
                assert!(!norm.is_finite());
            }
        }
    }
}
