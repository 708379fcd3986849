//! Launches that are recorded once and run again and again, and the memory that they are recorded with.

use qlora_kernels::cuda::StepMemory;
use qlora_kernels::ops::swiglu;
use qlora_kernels::tensor::{DeviceTensor, TensorView};
use qlora_kernels::{Dtype, Matrix, Result, View, Workspace};

use crate::harness::new_gpu;

const ROWS: usize = 5;
const COLS: usize = 96;

fn numbers(seed: usize) -> Vec<f32> {
    (0..ROWS * COLS).map(|i| ((i * 31 + seed * 17) % 97) as f32 / 48.0 - 1.0).collect()
}

#[test]
fn recorded_launches_compute_with_what_is_there_when_they_run() {
    let Some(device) = new_gpu() else { return };
    let workspace = Workspace::poisoned_on(&device, Dtype::F32).unwrap();
    let gpu = workspace.gpu().unwrap().clone();
    let mut x = workspace.upload(&numbers(0), ROWS, COLS).unwrap();
    let memory = StepMemory::new(&gpu);
    // silu(silu(x) x) x, through a matrix that is dropped.
    let work = |workspace: &Workspace, x: View| -> Result<qlora_kernels::Matrix> {
        let mut inner = workspace.matrix(ROWS, COLS)?;
        swiglu::forward(x, x, inner.view_mut())?;
        let mut outer = workspace.matrix(ROWS, COLS)?;
        swiglu::forward(inner.view(), x, outer.view_mut())?;
        Ok(outer)
    };
    // Filling poison is no launch, so that recording goes without.
    let plain = Workspace::with_dtype(&device, Dtype::F32).unwrap();
    let reuse = memory.reuse();
    let missing = gpu.capture(&[], || work(&plain, x.view())).unwrap();
    assert!(missing.is_none(), "memory that is not there cannot be recorded");
    drop(work(&plain, x.view()).unwrap());
    let (graph, result) = gpu.capture(&[], || work(&plain, x.view())).unwrap().expect("only launches");
    drop(reuse);
    for seed in 1..4 {
        x.view_mut().copy_from(View::new(&numbers(seed), ROWS, COLS)).unwrap();
        let expected = work(&workspace, x.view()).unwrap().to_vec().unwrap();
        assert!(graph.launch().unwrap());
        assert_eq!(result.to_vec().unwrap(), expected, "input {seed}");
    }
    // Launches of this thread run again at once when the recording is over.
    assert_eq!(work(&workspace, x.view()).unwrap().to_vec().unwrap(), result.to_vec().unwrap());
}

#[test]
fn a_graph_whose_memory_is_gone_does_not_run() {
    let Some(device) = new_gpu() else { return };
    let workspace = Workspace::with_dtype(&device, Dtype::F32).unwrap();
    let gpu = workspace.gpu().unwrap().clone();
    let mut x = workspace.upload(&numbers(0), ROWS, COLS).unwrap();
    let source = workspace.upload(&numbers(1), ROWS, COLS).unwrap();
    let record = |x: &mut Matrix, source: &Matrix| {
        let (graph, ()) = gpu.capture(&[], || x.view_mut().copy_from(source.view())).unwrap().expect("only launches");
        graph
    };
    let graph = record(&mut x, &source);
    // Memory that the graph does not use may be freed.
    drop(workspace.zeros(ROWS, COLS).unwrap());
    assert!(graph.launch().unwrap());
    assert_eq!(x.to_vec().unwrap(), numbers(1));
    x.view_mut().copy_from(View::new(&numbers(0), ROWS, COLS)).unwrap();
    drop(source);
    assert!(!graph.launch().unwrap(), "an operand was freed");
    assert_eq!(x.to_vec().unwrap(), numbers(0));
}

#[test]
fn tensors_of_candle_are_recorded_where_the_graph_keeps_them() {
    let Some(device) = new_gpu() else { return };
    let workspace = Workspace::with_dtype(&device, Dtype::F32).unwrap();
    let gpu = workspace.gpu().unwrap().clone();
    let mut x = workspace.zeros(ROWS, COLS).unwrap();
    let tensor = workspace.upload(&numbers(2), ROWS, COLS).unwrap().into_tensor((ROWS, COLS)).unwrap();
    let kept = [DeviceTensor::new("test", &tensor).unwrap()];
    let (graph, refused) = {
        let view = TensorView::new("test", &tensor).unwrap();
        let recorded = gpu.capture(&kept, || x.view_mut().copy_from(view.view())).unwrap();
        let (graph, ()) = recorded.expect("the graph keeps it");
        (graph, gpu.capture(&[], || x.view_mut().copy_from(view.view())).unwrap().is_none())
    };
    assert!(refused, "nobody keeps it");
    drop((tensor, kept));
    assert!(graph.launch().unwrap());
    assert_eq!(x.to_vec().unwrap(), numbers(2));
}

#[test]
fn what_is_no_launch_cannot_be_recorded() {
    let Some(device) = new_gpu() else { return };
    let workspace = Workspace::with_dtype(&device, Dtype::F32).unwrap();
    let gpu = workspace.gpu().unwrap().clone();
    let mut x = workspace.zeros(ROWS, COLS).unwrap();
    let recorded = gpu.capture(&[], || x.view_mut().copy_from(View::new(&numbers(3), ROWS, COLS))).unwrap();
    assert!(recorded.is_none());
    // An error ends the recording too.
    let failed = gpu.capture(&[], || -> Result<()> { Err(qlora_kernels::Error::invalid("test", "on purpose")) });
    assert!(failed.unwrap_err().to_string().contains("on purpose"));
    // Work after the recording runs as usual.
    x.view_mut().copy_from(View::new(&numbers(3), ROWS, COLS)).unwrap();
    assert_eq!(x.to_vec().unwrap(), numbers(3));
}

#[test]
fn memory_of_steps_is_used_again_and_given_back() {
    let Some(device) = new_gpu() else { return };
    let workspace = Workspace::with_dtype(&device, Dtype::F32).unwrap();
    let gpu = workspace.gpu().unwrap().clone();
    let memory = StepMemory::new(&gpu);
    let reuse = memory.reuse();
    let kept = workspace.upload(&numbers(5), ROWS, COLS).unwrap();
    for seed in 0..3 {
        // Each gets the memory of the one before it; none gets that of `kept`.
        let other = workspace.upload(&numbers(seed), ROWS, COLS).unwrap();
        assert_eq!(other.to_vec().unwrap(), numbers(seed));
        assert_eq!(kept.to_vec().unwrap(), numbers(5));
    }
    drop((reuse, memory));
    // It outlives the handle as long as somebody holds some of it.
    assert_eq!(kept.to_vec().unwrap(), numbers(5));
}
