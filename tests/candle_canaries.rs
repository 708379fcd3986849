//! Traps of candle 0.11.1 that shaped this library, each as a test.
//!
//! They document why the code exists. A test that fails after an update of candle means that the trap is gone, and that
//! the workaround named in it can go too.

use std::panic::{AssertUnwindSafe, catch_unwind};

use candle_core::{CpuStorage, CustomOp1, CustomOp2, DType, Device, Layout, Result, Shape, Tensor, Var};
use candle_nn::Optimizer;

fn variable(rows: usize, cols: usize) -> Var {
    Var::randn(0f32, 1.0, (rows, cols), &Device::Cpu).unwrap()
}

/// The reason for `ops::rms_norm`, `ops::rope` and `ops::attention`.
#[test]
fn fused_operations_cut_the_gradient_without_an_error() {
    let weight = Tensor::ones(8, DType::F32, &Device::Cpu).unwrap();
    let cos = Tensor::ones((4, 4), DType::F32, &Device::Cpu).unwrap();
    let sin = Tensor::zeros((4, 4), DType::F32, &Device::Cpu).unwrap();
    type Op<'a> = &'a dyn Fn(&Tensor) -> Result<Tensor>;
    let cut: [(&str, Op); 3] = [
        ("rms_norm", &|x| candle_nn::ops::rms_norm(x, &weight, 1e-5)),
        ("softmax_last_dim", &|x| candle_nn::ops::softmax_last_dim(x)),
        ("rope", &|x| candle_nn::rotary_emb::rope(&x.reshape((1, 1, 4, 8))?, &cos, &sin)),
    ];
    for (name, op) in cut {
        let x = variable(4, 8);
        let y = op(x.as_tensor()).unwrap();
        assert!(!y.track_op(), "{name} is recorded now");
        let gradients = y.sqr().unwrap().sum_all().unwrap().backward().unwrap();
        assert!(gradients.get(&x).is_none(), "{name} has a gradient now");
    }
}

/// The reason why frozen weights sit inside our nodes and never are arguments of them.
#[test]
fn a_matrix_product_makes_gradients_for_frozen_weights() {
    let (x, frozen) = (variable(4, 8), Tensor::randn(0f32, 1.0, (8, 6), &Device::Cpu).unwrap());
    let loss = x.as_tensor().matmul(&frozen).unwrap().sum_all().unwrap();
    let gradients = loss.backward().unwrap();
    assert!(gradients.get(&frozen).is_some());
}

struct NoGradient;

impl CustomOp1 for NoGradient {
    fn name(&self) -> &'static str {
        "no_gradient"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        Ok((storage.clone(), layout.shape().clone()))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, _: &Tensor) -> Result<Option<Tensor>> {
        Ok(None)
    }
}

/// The reason why our nodes return no gradient only for arguments that candle does not track.
#[test]
fn a_missing_gradient_of_a_tracked_intermediate_panics() {
    let x = variable(2, 2);
    let on_variable = x.as_tensor().apply_op1(NoGradient).unwrap().sum_all().unwrap();
    assert!(on_variable.backward().unwrap().get(&x).is_none());
    let intermediate = x.as_tensor().affine(2.0, 0.0).unwrap();
    let loss = intermediate.apply_op1(NoGradient).unwrap().sum_all().unwrap();
    assert!(catch_unwind(AssertUnwindSafe(|| loss.backward())).is_err());
}

struct Add;

impl CustomOp2 for Add {
    fn name(&self) -> &'static str {
        "add"
    }

    fn cpu_fwd(&self, a: &CpuStorage, la: &Layout, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        Ok((a.clone(), la.shape().clone()))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, _: &Tensor, g: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        Ok((Some(g.clone()), Some(g.clone())))
    }
}

/// The reason why the flat adapter variable is an argument of the stack node.
#[test]
fn an_op_records_nothing_unless_an_argument_is_tracked() {
    let (a, b) = (Tensor::ones(3, DType::F32, &Device::Cpu).unwrap(), Var::ones(3, DType::F32, &Device::Cpu).unwrap());
    assert!(!a.apply_op2(&a.clone(), Add).unwrap().track_op());
    assert!(a.apply_op2(b.as_tensor(), Add).unwrap().track_op());
}

/// The reason for `ops::adamw`: candle's moments take the variable's dtype, and bf16(0.999) is 1.
#[test]
fn candles_adamw_does_not_train_in_bf16() {
    let train = |dtype: DType| {
        let x = Var::ones(4, dtype, &Device::Cpu).unwrap();
        let params = candle_nn::ParamsAdamW { lr: 1e-4, weight_decay: 0.0, ..Default::default() };
        let mut optimizer = candle_nn::AdamW::new(vec![x.clone()], params).unwrap();
        for _ in 0..200 {
            optimizer.backward_step(&x.as_tensor().sqr().unwrap().sum_all().unwrap()).unwrap();
        }
        x.as_tensor().to_dtype(DType::F32).unwrap().to_vec1::<f32>().unwrap()[0]
    };
    assert_eq!(train(DType::BF16), 1.0);
    assert!(train(DType::F32) < 0.99);
}

/// The reason why one flat variable is never handed to the graph in `narrow`ed pieces: each piece's backward pads with
/// zeros to the size of the whole.
#[test]
fn the_gradient_of_a_slice_is_as_large_as_its_source() {
    let flat = Var::ones(1000, DType::F32, &Device::Cpu).unwrap();
    let loss = flat.as_tensor().narrow(0, 10, 2).unwrap().sum_all().unwrap();
    let gradient = loss.backward().unwrap().remove(&flat).unwrap();
    assert_eq!(gradient.elem_count(), 1000);
}

/// Where our libraries call something of candle's that launches one of candle's own kernels if its tensor is on a GPU, and why no
/// program of ours launches one in bf16 there: built for several architectures, candle's kernels have none
/// (`book/src/guide/cuda-builds.md`). `tests/cuda_model` tries it on a GPU. A new line is to be explained here, or written over `qlora-kernels`.
const CANDLE_KERNELS: &[(&str, &str, usize, &str)] = &[
    (
        "qlora-core/src/autograd/ops.rs",
        "contiguous",
        18,
        "the graph's operations, for models of one's own: programs train without candle's graph",
    ),
    ("qlora-core/src/autograd/ops.rs", "affine", 1, "the same"),
    (
        "qlora-core/src/autograd/stack.rs",
        "contiguous",
        1,
        "the same; a gradient that comes from our own node is contiguous",
    ),
    (
        "qlora-core/src/autograd/tables.rs",
        "contiguous",
        2,
        "trained tables in the graph, for models of one's own; a gradient that comes from our own node is contiguous",
    ),
    ("qlora-core/src/autograd/tables.rs", "to_dtype", 1, "the same: one number"),
    ("qlora-kernels/src/ops/dora_linear.rs", "broadcast_mul", 1, "DoRA's gains, over copies in f32"),
    ("qlora-kernels/src/ops/dora_linear.rs", "sum_keepdim", 2, "the gradient of its magnitudes, the same"),
    ("qlora-core/src/nn.rs", "to_dtype", 2, "the layers for models of one's own"),
    ("qlora-core/src/nn.rs", "broadcast_add", 1, "the same"),
    ("qlora-core/src/merge/gap.rs", "to_dtype", 1, "logits of models in f32, on the CPU"),
    ("qlora-core/src/sampling/sampler.rs", "to_dtype", 1, "behind to_device: on the CPU"),
];

#[test]
fn what_launches_kernels_of_candles_is_known() {
    const LAUNCHES: [&str; 16] = [
        "contiguous",
        "to_dtype",
        "affine",
        "broadcast_add",
        "broadcast_sub",
        "broadcast_mul",
        "broadcast_div",
        "index_select",
        "index_add",
        "gather",
        "scatter_add",
        "where_cond",
        "sum_keepdim",
        "ones_like",
        "force_contiguous",
        "arg_sort_last_dim",
    ];
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("crates");
    let mut found = std::collections::BTreeMap::new();
    let mut folders: Vec<_> =
        ["qlora-kernels", "qlora-core", "qlora-trainer"].iter().map(|name| root.join(name).join("src")).collect();
    let mut files = 0;
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap();
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            // Files that only tests use are skipped.
            if !name.ends_with(".rs") || ["tests.rs", "testing.rs", "test_support.rs"].contains(&name) {
                continue;
            }
            files += 1;
            let text = std::fs::read_to_string(&path).unwrap();
            if !text.contains("candle_core") {
                continue;
            }
            let code = text.split("#[cfg(test)]\nmod ").next().unwrap();
            let place = path.strip_prefix(&root).unwrap().to_str().unwrap().to_owned();
            for line in code.lines().filter(|line| !line.trim_start().starts_with("//")) {
                for method in LAUNCHES {
                    let count = line.matches(&format!(".{method}(")).count();
                    if count > 0 {
                        *found.entry((place.clone(), method)).or_insert(0) += count;
                    }
                }
            }
        }
    }
    assert!(files > 100, "{files} files were read: where are they?");
    let known = CANDLE_KERNELS.iter().map(|(file, method, count, _)| ((file.to_string(), *method), *count)).collect();
    assert_eq!(found, known);
}
