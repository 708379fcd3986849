//! Copies between devices and element types: one rounding, nothing else.

use qlora_kernels::{Dtype, View, Workspace};

use crate::harness::{GAPS, Side, dtypes, gpu, round, same_bits};

/// Ordinary numbers, ties, subnormals of the narrow types, values beyond f16, infinities, signed zeros.
fn values(side: &Side, len: usize) -> Vec<f32> {
    let mut values = side.values_f32(len, 3.0);
    let corners =
        [0.0, -0.0, 1e-6, -3e-8, 1e-40, 65_504.0, 65_520.0, 1e30, f32::INFINITY, f32::NEG_INFINITY, 1.0 + 1.0 / 256.0];
    for (i, value) in values.iter_mut().enumerate().filter(|(i, _)| i % 5 == 0) {
        *value = corners[i / 5 % corners.len()];
    }
    values
}

#[test]
fn copies_round_once() {
    let Some(device) = gpu() else { return };
    for from in dtypes(&device) {
        for to in dtypes(&device) {
            for (rows, cols) in [(0, 4), (1, 1), (3, 7), (17, 33), (64, 576), (1, 100_003)] {
                for gap in GAPS {
                    let label = format!("{} to {}, {rows} x {cols}, gap {gap}", from.name(), to.name());
                    let (source, target) = (Side::gpu(&device, from, 3), Side::gpu(&device, to, 4));
                    let values = values(&source, rows * cols);
                    // From the host with gaps.
                    let mut padded = vec![f32::NAN; rows * (cols + gap)];
                    for (row, values) in padded.chunks_exact_mut(cols + gap).zip(values.chunks_exact(cols)) {
                        row[..cols].copy_from_slice(values);
                    }
                    let mut first = source.output(rows, cols, gap);
                    first.view_mut().copy_from(View::strided(&padded, rows, cols, cols + gap)).unwrap();
                    let once: Vec<f32> = values.iter().map(|&x| round(x, from)).collect();
                    assert!(same_bits(&first.to_vec(), &once), "{label}: from the host");
                    // On the device.
                    let mut second = target.output(rows, cols, gap);
                    second.view_mut().copy_from(first.view()).unwrap();
                    let twice: Vec<f32> = once.iter().map(|&x| round(x, to)).collect();
                    assert!(same_bits(&second.to_vec(), &twice), "{label}: on the device");
                    assert!(same_bits(&second.view().to_vec().unwrap(), &twice), "{label}: a window to the host");
                    // To the host with gaps.
                    let mut host = Side::cpu(Dtype::F32, 1).output(rows, cols, gap);
                    host.view_mut().copy_from(second.view()).unwrap();
                    assert!(same_bits(&host.to_vec(), &twice), "{label}: to the host");
                }
            }
        }
    }
}

#[test]
fn fills_round_and_stay_inside() {
    let Some(device) = gpu() else { return };
    for dtype in dtypes(&device) {
        let side = Side::gpu(&device, dtype, 1);
        for (rows, cols) in [(0, 4), (1, 1), (3, 7), (64, 576)] {
            for gap in GAPS {
                for value in [0.0, 1.0 / 3.0, -7.25] {
                    let mut window = side.output(rows, cols, gap);
                    window.view_mut().fill(value).unwrap();
                    assert_eq!(window.to_vec(), vec![round(value, dtype); rows * cols]);
                }
            }
        }
        assert_eq!(side.workspace.zeros(3, 5).unwrap().to_vec().unwrap(), [0.0; 15]);
        let (zeros, matrix) = (side.workspace.zeros_f32(3, 5).unwrap(), side.workspace.matrix(3, 5).unwrap());
        assert_eq!((zeros.dtype(), matrix.dtype()), (Dtype::F32, dtype));
        assert!(matrix.to_vec().unwrap().iter().all(|x| x.is_nan()));
    }
}

#[test]
fn tensors_of_candle_are_the_same_memory() {
    use candle_core::{DType, Tensor};
    use qlora_kernels::tensor::{TensorView, update_in_place};
    let Some(device) = gpu() else { return };
    for dtype in dtypes(&device) {
        let candle = match dtype {
            Dtype::F32 => DType::F32,
            Dtype::Bf16 => DType::BF16,
            Dtype::F16 => DType::F16,
        };
        let workspace = Workspace::poisoned_on(&device, dtype).unwrap();
        let values: Vec<f32> = (0..24).map(|i| i as f32 - 11.5).collect();
        let mut matrix = workspace.matrix(4, 6).unwrap();
        matrix.view_mut().copy_from(View::new(&values, 4, 6)).unwrap();
        let tensor = matrix.into_tensor((2, 2, 6)).unwrap();
        assert_eq!((tensor.dtype(), tensor.dims()), (candle, &[2, 2, 6][..]));
        // candle's own kernels read it, and ours what candle made.
        let doubled = (tensor * 2.0).unwrap();
        let part = doubled.narrow(0, 1, 1).unwrap();
        let view = TensorView::new("test", &part).unwrap();
        let want: Vec<f32> = values[12..].iter().map(|x| 2.0 * x).collect();
        assert_eq!((view.view().shape(), view.view().to_vec().unwrap()), ([2, 6], want));
        assert!(view.as_slice().is_err());
        let tensor = Tensor::zeros(5, candle, &device).unwrap();
        update_in_place("test", &tensor, |view| view.fill(3.0)).unwrap();
        assert_eq!(tensor.to_dtype(DType::F32).unwrap().to_vec1::<f32>().unwrap(), [3.0; 5]);
    }
    // Memory goes round between the two allocators' callers without a leak or a double free.
    let workspace = Workspace::new(&device).unwrap();
    for _ in 0..1000 {
        let tensor = workspace.zeros(64, 64).unwrap().into_tensor((64, 64)).unwrap();
        drop((tensor + 1.0).unwrap());
    }
    workspace.gpu().unwrap().synchronize("test").unwrap();
    let margin = workspace.with_margin(2, 3, 8).unwrap();
    assert!(margin.into_tensor((2, 3)).unwrap_err().to_string().contains("margin"));
}
