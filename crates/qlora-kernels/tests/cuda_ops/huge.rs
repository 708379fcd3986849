//! A shape with more than 2^31 elements: 32-bit indices would wrap.

use qlora_kernels::ops::swiglu;
use qlora_kernels::{Dtype, Matrix, View, Workspace};

use crate::harness::{Side, gpu, half, relative_error};

const ROWS: usize = 80_000;
const COLS: usize = 28_672;

/// Rows before, at and after element 2^31, and the first and last.
const SAMPLED: [usize; 7] = [0, 1, 37_449, 74_897, 74_898, 74_899, 79_999];

fn row(matrix: &Matrix, row: usize) -> Vec<f32> {
    matrix.view().slice_rows(row..row + 1).to_vec().unwrap()
}

#[test]
fn matrices_of_more_than_2_31_elements() {
    let Some(device) = gpu() else { return };
    let workspace = Workspace::poisoned_on(&device, half(&device)).unwrap();
    let needed = 3 * (ROWS * COLS * 2) as u64 + (1 << 30);
    let available = workspace.gpu().unwrap().pool().available().unwrap();
    if available < needed {
        println!(
            "skipped: {:.1} GB of GPU memory are needed, {:.1} GB are free",
            needed as f64 / 1e9,
            available as f64 / 1e9
        );
        return;
    }
    let (side, host) = (Side::cpu(Dtype::Bf16, 1), Workspace::poisoned());
    let make = |fill: f32| {
        let mut matrix = workspace.matrix(ROWS, COLS).unwrap();
        matrix.view_mut().fill(fill).unwrap();
        let rows: Vec<Vec<f32>> = SAMPLED.iter().map(|_| side.values(COLS, 1.0)).collect();
        for (&row, values) in SAMPLED.iter().zip(&rows) {
            matrix.view_mut().slice_rows(row..row + 1).copy_from(View::vector(values)).unwrap();
        }
        (matrix, rows)
    };
    let ((gate, gate_rows), (up, up_rows)) = (make(1.5), make(-2.0));
    let silu = 1.5 / (1.0 + (-1.5f64).exp());
    let check = |h: &Matrix, what: &str| {
        for (index, &sampled) in SAMPLED.iter().enumerate() {
            let mut want = host.matrix(1, COLS).unwrap();
            let (gate, up) = (View::vector(&gate_rows[index]), View::vector(&up_rows[index]));
            swiglu::forward(gate, up, want.view_mut()).unwrap();
            let wide = |values: &[f32]| -> Vec<f64> { values.iter().map(|&x| f64::from(x)).collect() };
            let error = relative_error(&wide(&row(h, sampled)), &wide(want.as_slice()));
            assert!(error < 2.5e-3, "{what}, row {sampled}: {error:.1e}");
        }
        // Rows that were filled, spread over the whole matrix.
        for sampled in (2..ROWS).step_by(997).filter(|row| !SAMPLED.contains(row)) {
            let row = row(h, sampled);
            assert!(row.iter().all(|&x| (f64::from(x) / (-2.0 * silu) - 1.0).abs() < 4e-3), "{what}, row {sampled}");
        }
    };
    let mut h = workspace.matrix(ROWS, COLS).unwrap();
    swiglu::forward(gate.view(), up.view(), h.view_mut()).unwrap();
    check(&h, "swiglu");
    // A copy of it over one of its inputs.
    let mut copy = up;
    copy.view_mut().copy_from(h.view()).unwrap();
    check(&copy, "copy");
    drop((gate, copy, h));
    workspace.gpu().unwrap().synchronize("test").unwrap();
    workspace.trim();
}
