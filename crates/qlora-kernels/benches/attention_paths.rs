//! Our own attention beside cuDNN's, by the lengths in the batch: what the thresholds in `ops/attention/route.rs` come from.
//!
//!     cargo bench -p qlora-kernels --features cuda --bench attention_paths [-- <part of a case's name>]
//!
//! 32 query heads, 8 key/value heads of 128, bf16, as windows of fused buffers with an adapter's margin. Times are medians by
//! the GPU's clock; calls take turns with several sets of buffers. The last column is the path that a run would take.

use qlora_kernels::cuda::{self, AttentionCalls, Gpu};
use qlora_kernels::ops::attention::{self, AttentionConfig, AttentionPath, LseOrder};
use qlora_kernels::{Dtype, Matrix, Result, SequenceLayout, View, Workspace};

const HEADS: usize = 32;
const KV_HEADS: usize = 8;
const HEAD_DIM: usize = 128;
const MARGIN: usize = 16;
/// Sets of buffers that calls take turns with, so that the L2 cache does not answer.
const SETS: usize = 3;

struct Bench<'a> {
    gpu: &'a Gpu,
    workspace: &'a Workspace,
}

/// Milliseconds of forward and backward, if the path ran.
type Times = Option<[f64; 2]>;

impl Bench<'_> {
    fn filled(&self, rows: usize, cols: usize, margin: usize) -> Result<Vec<Matrix>> {
        let row: Vec<f32> = (0..cols).map(|i| ((i * 7919 % 1013) as f32 / 1013.0 - 0.5) * 2.0).collect();
        let make = |_| -> Result<Matrix> {
            let mut matrix = self.workspace.with_margin(rows, cols, margin)?;
            matrix.view_mut().slice_rows(0..1).copy_from(View::vector(&row))?;
            let mut filled = 1;
            while filled < rows {
                // Doubling: copies on the device.
                let next = (2 * filled).min(rows);
                let mut copy = self.workspace.matrix(next - filled, cols)?;
                copy.view_mut().copy_from(matrix.view().slice_rows(0..next - filled))?;
                matrix.view_mut().slice_rows(filled..next).copy_from(copy.view())?;
                filled = next;
            }
            Ok(matrix)
        };
        (0..SETS).map(make).collect()
    }

    fn median(&self, mut call: impl FnMut(usize) -> Result<()>) -> Result<f64> {
        const CALLS: usize = 4 * SETS;
        (0..SETS).try_for_each(&mut call)?;
        let round = |_| -> Result<f64> {
            let ms = self.gpu.time(|| (0..CALLS).try_for_each(|i| call(i % SETS)))?;
            Ok(ms / CALLS as f64)
        };
        let mut times = (0..15).map(round).collect::<Result<Vec<f64>>>()?;
        times.sort_by(f64::total_cmp);
        Ok(times[times.len() / 2])
    }

    fn times(&self, lengths: &[usize], path: Option<AttentionPath>) -> Result<(Times, AttentionCalls)> {
        let scale = (HEAD_DIM as f32).powf(-0.5);
        let config = AttentionConfig { heads: HEADS, kv_heads: KV_HEADS, head_dim: HEAD_DIM, scale, window: None };
        let (q_end, kv) = (HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM);
        let width = q_end + 2 * kv;
        let library = self.gpu.attention();
        library.set_path(path);
        let before = library.calls();
        let layout = SequenceLayout::from_lengths(lengths);
        let tokens = layout.tokens();
        let (qkv, dout) = (self.filled(tokens, width, 0)?, self.filled(tokens, q_end, 0)?);
        let (mut out, mut dqkv) = (self.filled(tokens, q_end, MARGIN)?, self.filled(tokens, width, MARGIN)?);
        let mut lse: Vec<Matrix> =
            (0..SETS).map(|_| self.workspace.matrix_f32(tokens, HEADS)).collect::<Result<_>>()?;
        let mut order = LseOrder::default();
        let split = |i: usize| {
            let qkv = qkv[i].view();
            [qkv.slice_cols(0..q_end), qkv.slice_cols(q_end..q_end + kv), qkv.slice_cols(q_end + kv..width)]
        };
        let forward = self.median(|i| {
            let ([q, k, v], out, lse) = (split(i), out[i].view_mut(), lse[i].view_mut());
            order = attention::forward(&config, q, k, v, &layout, out, lse, self.workspace)?;
            Ok(())
        })?;
        let backward = self.median(|i| {
            let [q, k, v] = split(i);
            let (dq, rest) = dqkv[i].view_mut().split_cols(q_end);
            let (dk, dv) = rest.split_cols(kv);
            let (out, lse, dout) = (out[i].view(), lse[i].view(), dout[i].view());
            attention::backward(&config, q, k, v, out, lse, order, dout, &layout, dq, dk, dv, self.workspace)
        })?;
        let calls = library.calls().since(before);
        let ran = match path {
            Some(AttentionPath::CudnnUniform) => calls.own == 0 && calls.cudnn_packed == 0,
            Some(AttentionPath::CudnnPacked) => calls.own == 0 && calls.cudnn_uniform == 0,
            _ => true,
        };
        Ok((ran.then_some([forward, backward]), calls))
    }

    fn row(&self, name: &str, lengths: &[usize]) -> Result<()> {
        let (tokens, squares): (usize, usize) =
            lengths.iter().fold((0, 0), |(sum, squares), len| (sum + len, squares + len * len));
        let show = |times: Times| match times {
            Some([forward, backward]) => format!("{forward:7.3} {backward:7.3} {:7.3}", forward + backward),
            None => format!("{:>7} {:>7} {:>7}", "-", "-", "-"),
        };
        let paths = [AttentionPath::Own, AttentionPath::CudnnPacked, AttentionPath::CudnnUniform];
        let mut columns = Vec::new();
        for path in paths {
            columns.push(show(self.times(lengths, Some(path))?.0));
        }
        // A layout of its own, twice: a length gets plans of its own when it comes again.
        self.times(lengths, None)?;
        let calls = self.times(lengths, None)?.1;
        let automatic = match calls {
            AttentionCalls { cudnn_packed: 0, cudnn_uniform: 0, .. } => "own",
            AttentionCalls { cudnn_packed: 0, .. } => "uniform",
            _ => "packed",
        };
        let longest = lengths.iter().max().copied().unwrap_or(0);
        println!(
            "{name:22} {:3} {tokens:5} {longest:4} {:6.0} | {} | {automatic}",
            lengths.len(),
            squares as f64 / tokens as f64,
            columns.join(" | ")
        );
        Ok(())
    }
}

/// Pseudo-random numbers from a range.
struct Random(u64);

impl Random {
    fn within(&mut self, from: usize, to: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        from + (self.0 >> 11) as usize % (to - from + 1)
    }

    /// A prompt of 20 to 700 tokens and an answer of 5 to 300.
    fn document(&mut self) -> usize {
        self.within(20, 700) + self.within(5, 300)
    }

    /// Bins filled with documents as they come.
    fn bins(&mut self, count: usize, capacity: usize) -> Vec<usize> {
        let (mut lengths, mut filled, mut room) = (Vec::new(), 0, capacity);
        while filled < count {
            let len = self.document();
            if len > room {
                (filled, room) = (filled + 1, capacity);
            } else {
                room -= len;
                lengths.push(len);
            }
        }
        lengths
    }
}

fn cases() -> Vec<(String, Vec<usize>)> {
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let mut cases = Vec::new();
    for sample in 0..4 {
        cases.push((format!("4 bins of 2048, #{sample}"), random.bins(4, 2048)));
    }
    // Bins with so many documents of about the same length each.
    for documents in [2, 3, 4, 5, 6] {
        let len = 2048 / documents;
        let bin = (0..documents).map(|i| if i % 2 == 0 { len - 7 } else { len + 5 });
        cases.push((format!("4 bins of {documents}"), (0..4).flat_map(|_| bin.clone()).collect()));
    }
    cases.push(("4 bins, one long each".to_owned(), [1500, 180, 180, 180].repeat(4)));
    for sample in 0..3 {
        cases.push((format!("8 documents, #{sample}"), (0..8).map(|_| random.within(25, 1000)).collect()));
    }
    for (sequences, len) in [(4, 2048), (1, 2048), (2, 1024), (2, 512), (8, 768)] {
        cases.push((format!("{sequences}x{len}"), vec![len; sequences]));
    }
    for len in [700, 1024, 1111, 1337, 1536, 1777, 2000] {
        cases.push((format!("1 document of {len}"), vec![len]));
    }
    cases
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
    let workspace = Workspace::with_dtype(&device, Dtype::Bf16)?;
    let gpu = Gpu::of(&device)?;
    let bench = Bench { gpu: &gpu, workspace: &workspace };
    println!("{}: milliseconds of forward, backward, both\n", gpu.model());
    println!(
        "{:22} {:>3} {:>5} {:>4} {:>6} | {:^23} | {:^23} | {:^23} | automatic",
        "batch", "seq", "tok", "max", "mean", "own", "cuDNN packed", "cuDNN uniform"
    );
    let filters: Vec<String> = std::env::args().skip(1).filter(|argument| !argument.starts_with('-')).collect();
    for (name, lengths) in cases() {
        if filters.is_empty() || filters.iter().any(|filter| name.contains(filter)) {
            bench.row(&name, &lengths)?;
        }
    }
    println!("\nattention: {}", gpu.attention().describe());
    for plan in gpu.attention().plans() {
        println!("{plan}");
    }
    println!("{}", gpu.counters());
    Ok(())
}
