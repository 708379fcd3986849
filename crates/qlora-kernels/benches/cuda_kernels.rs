//! The operations on a GPU at the shapes of an 8B model, each as a share of its floor.
//!
//!     cargo bench -p qlora-kernels --features cuda --bench cuda_kernels [-- --out kernels.csv --commit abc --date 2026-11-22]
//!
//! The floor of an operation that moves memory is its bytes (each input read once, each output written once) at the rate
//! of a large copy; that of one that multiplies is its arithmetic at the rate of a large bf16 product. Both rates are
//! measured in the same run. Times are medians by the GPU's clock; every call goes to another set of buffers, so that the L2
//! cache does not answer.
//!
//! Rows "in a graph" are calls recorded as a CUDA graph, back to back: the processor's time to enqueue a kernel, more than
//! such a kernel takes, is not in them; what lies between the kernels on the GPU is. The others are enqueued one by one.

use std::io::Write;

use qlora_kernels::cuda::{self, CudaWeight, Gpu};
use qlora_kernels::ops::adamw::{self, AdamW};
use qlora_kernels::ops::attention::{self, AttentionConfig, AttentionPath, LseOrder};
use qlora_kernels::ops::linear_group::{AdapterPass, Group, LoraSlot, Member};
use qlora_kernels::ops::rope::{self, RopeConfig, RopeTable};
use qlora_kernels::ops::{matmul, rms_norm, swiglu};
use qlora_kernels::quant::QuantConfig;
use qlora_kernels::weight::{PlainData, WeightCache};
use qlora_kernels::{Matrix, Result, SequenceLayout, Workspace};

const TOKENS: usize = 8192;
const HIDDEN: usize = 4096;
const MLP: usize = 14_336;
/// Sets of buffers that calls take turns with.
const SETS: usize = 3;

struct Bench<'a> {
    gpu: &'a Gpu,
    workspace: &'a Workspace,
    /// Bytes a second of a copy, read and written.
    copy: f64,
    /// Operations a second of a large bf16 product.
    product: f64,
    rows: Vec<String>,
}

/// The lower bound of an operation's time: the bytes it moves or the operations it computes.
#[derive(Clone, Copy)]
enum Floor {
    Bytes(f64),
    Flops(f64),
}

impl Bench<'_> {
    fn random(&self, rows: usize, cols: usize) -> Result<Matrix> {
        let mut matrix = self.workspace.matrix(rows, cols)?;
        let row: Vec<f32> = (0..cols).map(|i| ((i * 7919 % 1013) as f32 / 1013.0 - 0.5) * 2.0).collect();
        let mut filled = 0;
        while filled < rows {
            // Doubling: one small upload, then copies on the device.
            let next = (2 * filled).clamp(1, rows);
            if filled == 0 {
                matrix.view_mut().slice_rows(0..1).copy_from(qlora_kernels::View::vector(&row))?;
            } else {
                let mut copy = self.workspace.matrix(next - filled, cols)?;
                copy.view_mut().copy_from(matrix.view().slice_rows(0..next - filled))?;
                matrix.view_mut().slice_rows(filled..next).copy_from(copy.view())?;
            }
            filled = next;
        }
        Ok(matrix)
    }

    fn sets(&self, rows: usize, cols: usize) -> Result<Vec<Matrix>> {
        (0..SETS).map(|_| self.random(rows, cols)).collect()
    }

    /// The median time of a call in milliseconds.
    fn time(&self, mut call: impl FnMut(usize) -> Result<()>) -> Result<f64> {
        const CALLS: usize = 2 * SETS;
        (0..SETS).try_for_each(&mut call)?;
        let mut times = Vec::new();
        for _ in 0..11 {
            times.push(self.gpu.time(|| (0..CALLS).try_for_each(|i| call(i % SETS)))? / CALLS as f64);
        }
        times.sort_by(f64::total_cmp);
        Ok(times[times.len() / 2])
    }

    /// The median time of a call in milliseconds, of `sets` calls in a graph (and its multiples up to some thirty).
    fn time_recorded(&self, sets: usize, mut call: impl FnMut(usize) -> Result<()>) -> Result<f64> {
        let calls = sets * 32usize.div_ceil(sets);
        (0..sets).try_for_each(&mut call)?;
        let mut times = self.gpu.time_recorded(11, || (0..calls).try_for_each(|i| call(i % sets)))?;
        times.sort_by(f64::total_cmp);
        Ok(times[times.len() / 2] / calls as f64)
    }

    fn report(&mut self, name: &str, shape: &str, floor: Floor, call: impl FnMut(usize) -> Result<()>) -> Result<()> {
        let ms = self.time(call)?;
        self.row(name, shape, floor, ms);
        Ok(())
    }

    fn row(&mut self, name: &str, shape: &str, floor: Floor, ms: f64) {
        let (rate, unit, share) = match floor {
            Floor::Bytes(bytes) => (bytes / ms / 1e6, "GB/s", bytes / ms * 1e3 / self.copy),
            Floor::Flops(flops) => (flops / ms / 1e9, "TFLOP/s", flops / ms * 1e3 / self.product),
        };
        println!("{name:32} {shape:28} {:9.1} us {rate:8.0} {unit:8} {share:.3} of its floor", ms * 1e3);
        self.rows.push(format!("qlora,{name},{shape},{:.1},{rate:.0},{unit},{share:.3}", ms * 1e3));
    }
}

fn main() -> Result<()> {
    let device = match cuda::device(0, None) {
        Ok(device) => device,
        // `cargo test` starts benches too.
        Err(error) => {
            println!("nothing measured: {error}");
            return Ok(());
        }
    };
    let workspace = Workspace::new(&device)?;
    let gpu = Gpu::of(&device)?;
    let mut bench = Bench { gpu: &gpu, workspace: &workspace, copy: 1.0, product: 1.0, rows: Vec::new() };
    ceilings(&mut bench)?;
    elementwise(&mut bench)?;
    weights(&mut bench)?;
    few_tokens(&mut bench, "14336x4096", &[MLP])?;
    few_tokens(&mut bench, "q|k|v 4096+1024+1024x4096", &[HIDDEN, 1024, 1024])?;
    attentions(&mut bench)?;
    optimizer(&mut bench)?;
    write(&bench.rows, gpu.model())
}

fn ceilings(bench: &mut Bench) -> Result<()> {
    let (from, mut to) = (bench.sets(32_768, 8192)?, bench.sets(32_768, 8192)?);
    let bytes = 2.0 * 2.0 * (32_768 * 8192) as f64;
    bench.copy = bytes * 1e3 / bench.time(|i| to[i].view_mut().copy_from(from[i].view()))?;
    drop((from, to));
    let (a, b, mut c) = (bench.sets(8192, 8192)?, bench.sets(8192, 8192)?, bench.sets(8192, 8192)?);
    let time = bench.time(|i| matmul::nt(a[i].view(), b[i].view(), c[i].view_mut(), 1.0, 0.0))?;
    bench.product = 2.0 * 8192f64.powi(3) * 1e3 / time;
    println!("copy {:.0} GB/s, product {:.0} TFLOP/s", bench.copy / 1e9, bench.product / 1e12);
    Ok(())
}

fn elementwise(bench: &mut Bench) -> Result<()> {
    let bytes = |columns: usize| Floor::Bytes(2.0 * (TOKENS * columns) as f64);
    let weight = bench.workspace.upload(&vec![1.0; HIDDEN], 1, HIDDEN)?;
    let (x, mut y, dy) = (bench.sets(TOKENS, HIDDEN)?, bench.sets(TOKENS, HIDDEN)?, bench.sets(TOKENS, HIDDEN)?);
    let mut rstd = bench.workspace.matrix_f32(TOKENS, 1)?;
    let shape = format!("{TOKENS}x{HIDDEN}");
    bench.report("rms_norm", &shape, bytes(2 * HIDDEN), |i| {
        rms_norm::forward(x[i].view(), weight.view(), 1e-5, y[i].view_mut(), rstd.view_mut())
    })?;
    bench.report("rms_norm backward accumulate", &shape, bytes(4 * HIDDEN), |i| {
        rms_norm::backward(x[i].view(), weight.view(), rstd.view(), dy[i].view(), y[i].view_mut(), true)
    })?;
    drop((x, y, dy));

    let table = RopeTable::new(&RopeConfig { theta: 5e5, scaling: None }, 128, TOKENS)?;
    let layout = SequenceLayout::from_lengths(&[TOKENS]);
    let mut qkv = bench.sets(TOKENS, 48 * 128)?;
    bench.report("rope", "8192 x 40 heads x 128", bytes(2 * 40 * 128), |i| {
        rope::forward(qkv[i].view_mut().slice_cols(0..40 * 128), 128, &table, layout.positions())
    })?;
    drop(qkv);

    let (mut gate_up, mut h) = (bench.sets(TOKENS, 2 * MLP)?, bench.sets(TOKENS, MLP)?);
    let shape = format!("{TOKENS}x{MLP}");
    bench.report("swiglu", &shape, bytes(3 * MLP), |i| {
        let gate_up = gate_up[i].view();
        swiglu::forward(gate_up.slice_cols(0..MLP), gate_up.slice_cols(MLP..2 * MLP), h[i].view_mut())
    })?;
    bench.report("swiglu backward + h in dh", &shape, bytes(6 * MLP), |i| {
        let (gate, up) = gate_up[i].view_mut().split_cols(MLP);
        swiglu::backward_in_place(gate, up, h[i].view_mut())
    })
}

fn weights(bench: &mut Bench) -> Result<()> {
    for (rows, cols) in [(MLP, HIDDEN), (HIDDEN, MLP), (HIDDEN, HIDDEN), (1024, HIDDEN)] {
        let data: Vec<f32> = (0..rows * cols).map(|i| ((i * 7919 % 10_007) as f32 / 10_007.0 - 0.5) * 0.1).collect();
        let weight = CudaWeight::quantize(&PlainData::F32(data), rows, cols, &QuantConfig::default(), bench.workspace)?;
        let mut out: Vec<Matrix> = (0..SETS).map(|_| bench.workspace.matrix(rows, cols)).collect::<Result<_>>()?;
        let elements = (rows * cols) as f64;
        let bytes = elements * (0.5 + 1.0 / 64.0 + 4.0 / 16_384.0 + 2.0);
        bench.report("dequantize nested", &format!("{rows}x{cols} to bf16"), Floor::Bytes(bytes), |i| {
            weight.dequantize_into(0, out[i].view_mut().cuda("bench")?)
        })?;
        let ms = bench.time_recorded(SETS, |i| weight.dequantize_into(0, out[i].view_mut().cuda("bench")?))?;
        bench.row("dequantize nested (in a graph)", &format!("{rows}x{cols} to bf16"), Floor::Bytes(bytes), ms);
        group(bench, &weight, rows, cols)?;
    }
    Ok(())
}

/// A projection with its adapter, r = 16, forward and the gradient of its input; the floor counts the frozen product alone.
fn group(bench: &mut Bench, weight: &CudaWeight, rows: usize, cols: usize) -> Result<()> {
    const RANK: usize = 16;
    let (a, b) = (0..RANK * cols, RANK * cols..RANK * (cols + rows));
    let slot = LoraSlot { a, b: b.clone(), rank: RANK, scale: 2.0, stream: 0, kind: Default::default() };
    let values = bench.workspace.upload(&vec![0.01; b.end], 1, b.end)?;
    let members = [Member { name: "", weight, bias: None, lora: Some(&slot) }];
    let cache = WeightCache::default();
    let group = Group { members: &members, cache: &cache, split: false };
    let pass = AdapterPass::new(values.view());
    let workspace = bench.workspace;
    let with_margin =
        |cols| -> Result<Vec<Matrix>> { (0..SETS).map(|_| workspace.with_margin(TOKENS, cols, RANK)).collect() };
    let (mut x, mut y) = (with_margin(cols)?, with_margin(rows)?);
    for (x, y) in x.iter_mut().zip(&mut y) {
        x.view_mut().copy_from(bench.random(TOKENS, cols)?.view())?;
        y.view_mut().copy_from(bench.random(TOKENS, rows)?.view())?;
    }
    let flops = Floor::Flops(2.0 * (TOKENS * rows * cols) as f64);
    let shape = format!("{TOKENS} tokens {rows}x{cols}");
    bench.report("linear_group forward r=16", &shape, flops, |i| {
        group.forward(x[i].view_mut(), Some(&pass), None, y[i].view_mut(), workspace).map(drop)
    })?;
    bench.report("linear_group backward_input r=16", &shape, flops, |i| {
        group.backward_input(y[i].view_mut(), &pass, Some(x[i].view_mut()), workspace).map(drop)
    })
}

/// A group of projections of a few tokens, as in generation: the products alone, and with adapters, r = 16 (a launch more,
/// for `x A^T`). The floor counts the 4-bit weights, what the adapters add, x and y.
fn few_tokens(bench: &mut Bench, name: &str, rows: &[usize]) -> Result<()> {
    const RANK: usize = 16;
    // In all at least 250 MB of weights, so that none is left in the L2 cache when its turn comes again.
    const ROTATED: f64 = 250e6;
    let outputs: usize = rows.iter().sum();
    let weight_bytes = (outputs * HIDDEN) as f64 * (0.5 + 1.0 / 64.0 + 4.0 / 16_384.0);
    let sets = (ROTATED / weight_bytes).ceil() as usize;
    let workspace = bench.workspace;
    let data: Vec<f32> = (0..outputs * HIDDEN).map(|i| ((i * 7919 % 10_007) as f32 / 10_007.0 - 0.5) * 0.1).collect();
    let mut groups: Vec<Vec<CudaWeight>> = Vec::new();
    for _ in 0..sets {
        let quantized = rows.iter().map(|&rows| {
            let data = PlainData::F32(data[..rows * HIDDEN].to_vec());
            CudaWeight::quantize(&data, rows, HIDDEN, &QuantConfig::default(), workspace)
        });
        groups.push(quantized.collect::<Result<_>>()?);
    }
    let (mut slots, mut end) = (Vec::new(), 0);
    for &rows in rows {
        let (a, b) = (end..end + RANK * HIDDEN, end + RANK * HIDDEN..end + RANK * (HIDDEN + rows));
        end = b.end;
        slots.push(LoraSlot { a, b, rank: RANK, scale: 2.0, stream: 0, kind: Default::default() });
    }
    let values = workspace.upload(&vec![0.01; end], 1, end)?;
    let pass = AdapterPass::new(values.view());
    let cache = WeightCache::default();
    for tokens in [1, 8, 16, 64] {
        let (mut x, mut y) = (bench.random(tokens, HIDDEN)?, workspace.matrix(tokens, outputs)?);
        let moved = weight_bytes + 2.0 * (tokens * (HIDDEN + outputs)) as f64;
        let shape = format!("{tokens} tokens {name}");
        for (label, adapter) in [("linear_group infer", None), ("linear_group infer r=16", Some(&pass))] {
            let adapters = if adapter.is_some() { 4.0 * end as f64 } else { 0.0 };
            let ms = bench.time_recorded(sets, |i| {
                let members: Vec<Member> = (groups[i].iter().zip(&slots))
                    .map(|(weight, slot)| Member { name: "", weight, bias: None, lora: Some(slot) })
                    .collect();
                let group = Group { members: &members, cache: &cache, split: false };
                group.infer(x.view_mut(), adapter, None, y.view_mut(), workspace)
            })?;
            bench.row(&format!("{label} (in a graph)"), &shape, Floor::Bytes(moved + adapters), ms);
        }
    }
    Ok(())
}

fn attentions(bench: &mut Bench) -> Result<()> {
    let config = AttentionConfig { heads: 32, kv_heads: 8, head_dim: 128, scale: 128f32.powf(-0.5), window: None };
    for library in [false, true] {
        bench.gpu.attention().set_enabled(library);
        bench.gpu.attention().set_path(library.then_some(AttentionPath::CudnnUniform));
        let name = if library { "attention (cuDNN where it serves)" } else { "attention" };
        for (sequences, len) in [(1, 2048), (4, 2048), (1, 8192)] {
            let tokens = sequences * len;
            let layout = SequenceLayout::from_lengths(&vec![len; sequences]);
            let qkv = bench.sets(tokens, 6144)?;
            let (mut out, dout) = (bench.sets(tokens, HIDDEN)?, bench.sets(tokens, HIDDEN)?);
            let mut lse: Vec<Matrix> =
                (0..SETS).map(|_| bench.workspace.matrix_f32(tokens, 32)).collect::<Result<_>>()?;
            let mut dqkv = bench.sets(tokens, 6144)?;
            let (flops, shape) = (2.0 * (tokens * len * HIDDEN) as f64, format!("{sequences}x{len} 32/8 heads of 128"));
            let workspace = bench.workspace;
            let mut order = LseOrder::default();
            bench.report(&format!("{name} forward"), &shape, Floor::Flops(flops), |i| {
                let qkv = qkv[i].view();
                let (q, k, v) = (qkv.slice_cols(0..4096), qkv.slice_cols(4096..5120), qkv.slice_cols(5120..6144));
                let (out, lse) = (out[i].view_mut(), lse[i].view_mut());
                order = attention::forward(&config, q, k, v, &layout, out, lse, workspace)?;
                Ok(())
            })?;
            bench.report(&format!("{name} backward"), &shape, Floor::Flops(2.5 * flops), |i| {
                let qkv = qkv[i].view();
                let (q, k, v) = (qkv.slice_cols(0..4096), qkv.slice_cols(4096..5120), qkv.slice_cols(5120..6144));
                let (dq, rest) = dqkv[i].view_mut().split_cols(4096);
                let (dk, dv) = rest.split_cols(1024);
                let (out, lse, dout) = (out[i].view(), lse[i].view(), dout[i].view());
                attention::backward(&config, q, k, v, out, lse, order, dout, &layout, dq, dk, dv, workspace)
            })?;
        }
    }
    println!("attention: {}", bench.gpu.attention().describe());
    bench.gpu.attention().set_path(None);
    Ok(())
}

fn optimizer(bench: &mut Bench) -> Result<()> {
    const PARAMETERS: usize = 41_943_040;
    let zeros = || bench.workspace.zeros_f32(1, PARAMETERS);
    let (mut param, grad, mut m, mut v) = (zeros()?, zeros()?, zeros()?, zeros()?);
    let config = AdamW { lr: 1e-4, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.0 };
    bench.report("adamw", "41943040", Floor::Bytes(28.0 * PARAMETERS as f64), |_| {
        adamw::step(&config, 1, 1.0, param.view_mut(), grad.view(), m.view_mut(), v.view_mut())
    })
}

fn write(rows: &[String], gpu: &str) -> Result<()> {
    let arguments: Vec<String> = std::env::args().collect();
    let value = |name: &str| {
        let at = arguments.iter().position(|argument| argument == name)?;
        arguments.get(at + 1).cloned()
    };
    let Some(path) = value("--out") else { return Ok(()) };
    let [driver, commit, date] = ["--driver", "--commit", "--date"].map(|name| value(name).unwrap_or_default());
    let text: String = rows.iter().map(|row| format!("{row},{gpu},{driver},{commit},{date}\n")).collect();
    let appended = std::fs::OpenOptions::new().create(true).append(true).open(&path);
    let written = appended.and_then(|mut file| file.write_all(text.as_bytes()));
    written.map_err(|error| qlora_kernels::Error::invalid("results", format!("{path}: {error}")))
}
