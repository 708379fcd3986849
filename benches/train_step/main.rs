//! Training steps of an 8B model on a GPU: speed and peak memory, in the terms of `scripts/bench/peft_cuda.py`.
//!
//!     cargo bench --features cuda --bench train_step -- [--case free:4x2048,lean:4x2048@8.3] [--rank 16] [--targets all|qkvo]
//!         [--attention auto|own] [--limit-gib 24] [--layers 32] [--steps 5] [--warmup 2] [--out train_step.csv] [--gpu H100] [--driver 580]
//!         [--commit abc] [--date 2026-11-22] [--offload-embedding 1] [--8bit-moments 1] [--frozen-compute fp8]
//!         [--parts parts.csv] [--profile profile.csv]
//!
//! Llama-3.1-8B's shape with random weights, NF4 with double quantization, bf16 activations, AdamW with f32 state, the loss
//! over all tokens. A step is forward, backward, clipping and update, synchronized; tok/s is the tokens over the median
//! step. GB is the most memory in use at one time, by the GPU pool's own counter, over 1e9. `free` keeps all
//! activations and the dequantized weights; `lean` is the plan that needs the least memory, or with a budget (`@8.3`:
//! GB) the fastest within that; `plan` is what the planner chooses for the memory there is (`--limit-gib`).
//!
//! `--parts` measures what the step cannot do without in the same run ([`parts`]); `--profile` says what one more step spends
//! its time on. With `--frozen-compute fp8` the system is written `qlora-fp8`. With `--8bit-moments` or `--offload-embedding` the mode is written `lean+`.

#[path = "../common/command.rs"]
#[expect(dead_code, reason = "its arguments are read otherwise")]
mod command;
mod parts;
#[path = "../common/random_8b.rs"]
mod random_8b;
#[path = "../common/trainee.rs"]
mod trainee;

use std::time::Instant;

use anyhow::Context;
use command::append;
use qlora::kernels::Workspace;
use qlora::kernels::cuda::{self, Gpu};
use qlora::kernels::quant::QuantConfig;
use qlora::kernels::weight::FrozenCompute;
use qlora::lora::{LoraConfig, ModuleFilter, TargetModules};
use qlora::model::{BatchShape, CausalLm, LoadOptions, Planner, Quantization};
use qlora::trainer::config::Optim;
use random_8b::{RandomWeights, llama_8b};
use trainee::Trainee;

/// Such as `lean:4x2048@8.3`.
#[derive(Clone, Debug)]
struct Case {
    mode: String,
    sequences: usize,
    length: usize,
    budget: Option<u64>,
}

impl std::str::FromStr for Case {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Self> {
        let (mode, shape) = text.split_once(':').context("a case is written free:4x2048 or lean:4x2048@8.3")?;
        let (shape, budget) = shape.split_once('@').map_or((shape, None), |(shape, budget)| (shape, Some(budget)));
        let (sequences, length) = shape.split_once('x').context("a shape is written 4x2048")?;
        anyhow::ensure!(["free", "lean", "plan"].contains(&mode), "mode {mode}: expected free, lean or plan");
        let budget = budget.map(|gb| gb.parse::<f64>().map(|gb| (gb * 1e9) as u64)).transpose()?;
        Ok(Self { mode: mode.to_owned(), sequences: sequences.parse()?, length: length.parse()?, budget })
    }
}

struct Options {
    cases: Vec<Case>,
    rank: usize,
    targets: String,
    layers: usize,
    steps: usize,
    warmup: usize,
    out: Option<String>,
    attention: String,
    gpu: String,
    driver: String,
    commit: String,
    date: String,
    limit: Option<u64>,
    offload_embedding: bool,
    parts: Option<String>,
    profile: Option<String>,
    bits8: bool,
    fp8: bool,
}

fn options() -> anyhow::Result<Options> {
    let mut options = Options {
        cases: Vec::new(),
        rank: 16,
        targets: "all".into(),
        layers: 32,
        steps: 5,
        warmup: 2,
        out: None,
        attention: "auto".into(),
        gpu: String::new(),
        driver: String::new(),
        commit: String::new(),
        date: String::new(),
        limit: None,
        offload_embedding: false,
        parts: None,
        profile: None,
        bits8: false,
        fp8: false,
    };
    let mut arguments = std::env::args().skip(1).filter(|argument| argument != "--bench");
    while let Some(name) = arguments.next() {
        let value = arguments.next().with_context(|| format!("{name} takes a value"))?;
        match name.as_str() {
            "--case" => options.cases = value.split(',').map(str::parse).collect::<anyhow::Result<_>>()?,
            "--rank" => options.rank = value.parse()?,
            "--targets" => options.targets = value,
            "--layers" => options.layers = value.parse()?,
            "--steps" => options.steps = value.parse()?,
            "--warmup" => options.warmup = value.parse()?,
            "--out" => options.out = Some(value),
            "--attention" => options.attention = value,
            "--gpu" => options.gpu = value,
            "--driver" => options.driver = value,
            "--commit" => options.commit = value,
            "--date" => options.date = value,
            "--offload-embedding" => options.offload_embedding = value != "0",
            "--parts" => options.parts = Some(value),
            "--profile" => options.profile = Some(value),
            "--frozen-compute" => {
                anyhow::ensure!(value == "fp8", "--frozen-compute takes fp8");
                options.fp8 = true;
            }
            "--8bit-moments" => options.bits8 = value != "0",
            "--limit-gib" => options.limit = Some((value.parse::<f64>()? * (1u64 << 30) as f64) as u64),
            _ => anyhow::bail!("unknown option {name}"),
        }
    }
    if options.cases.is_empty() {
        let shapes = ["1x2048", "4x2048", "1x8192", "2x512"];
        let both = ["free", "lean"].map(|mode| shapes.map(|shape| format!("{mode}:{shape}").parse()));
        options.cases = both.into_iter().flatten().collect::<anyhow::Result<_>>()?;
    }
    Ok(options)
}

fn load(options: &Options, workspace: &Workspace) -> anyhow::Result<Trainee> {
    let started = Instant::now();
    let source = RandomWeights::new(llama_8b(options.layers));
    let load = LoadOptions {
        quantization: Quantization::Bits4(QuantConfig::default()),
        offload_embedding: options.offload_embedding,
        ..LoadOptions::default()
    };
    let mut model = CausalLm::load_on(&source, load, workspace.clone())?;
    drop(source);
    let gpu = workspace.gpu().context("the device is a GPU")?;
    let gb = |bytes: u64| bytes as f64 / 1e9;
    let reserved = gpu.pool().reserved()?;
    gpu.pool().trim()?;
    println!(
        "loaded in {:.1} s, {:.2} GB; {:.2} GB reserved, {:.2} of them in use by pieces of memory",
        started.elapsed().as_secs_f64(),
        gb(gpu.pool().used()?),
        gb(reserved),
        gb(gpu.pool().reserved()?)
    );
    let target_modules = match options.targets.as_str() {
        "all" => TargetModules::AllLinear,
        _ => TargetModules::Selected(ModuleFilter::List(
            ["q_proj", "k_proj", "v_proj", "o_proj"].map(str::to_owned).to_vec(),
        )),
    };
    let lora =
        LoraConfig { r: options.rank, lora_alpha: 2.0 * options.rank as f64, target_modules, ..LoraConfig::default() };
    model.add_adapter(lora, 0)?;
    if options.fp8 {
        model.set_frozen_compute(FrozenCompute::Fp8)?;
    }
    Trainee::new(model, if options.bits8 { Optim::Adamw8bit } else { Optim::AdamwTorch }, workspace)
}

/// One case in one mode.
fn measure(options: &Options, gpu: &Gpu, trainee: &mut Trainee, case: &Case) -> anyhow::Result<()> {
    let Case { mode, sequences, length, budget } = case;
    let (sequences, length) = (*sequences, *length);
    trainee.model.set_weight_cache(false);
    gpu.pool().trim()?;
    let planner = Planner::on_gpu(&trainee.model, BatchShape::uniform(sequences, length), 0)?;
    let plan = match mode.as_str() {
        "free" => planner.richest(),
        "lean" => budget.map_or(Ok(planner.leanest()), |budget| planner.plan(budget))?,
        _ => planner.plan(gpu.pool().plannable(options.limit)?)?,
    };
    println!("plan: {plan}");
    trainee.model.apply_plan(&plan)?;
    gpu.pool().reset_peak()?;
    let mut seconds = Vec::new();
    let mut loss = 0.0;
    for _ in 0..options.steps + options.warmup {
        let batch = trainee.batch(sequences, length);
        gpu.synchronize("bench")?;
        let start = Instant::now();
        loss = trainee.step(&batch)?;
        gpu.synchronize("bench")?;
        seconds.push(start.elapsed().as_secs_f64());
    }
    seconds.drain(..options.warmup);
    seconds.sort_by(f64::total_cmp);
    let median = seconds[seconds.len() / 2];
    let speed = (sequences * length) as f64 / median;
    let (peak, predicted) = (gpu.pool().peak()? as f64 / 1e9, plan.peak as f64 / 1e9);
    println!(
        "{sequences}x{length} {mode} {} r={}: {speed:.0} tok/s, {peak:.3} GB (predicted {predicted:.3}, {:+.2}%), \
         {:.1} ms (fastest {:.1}), loss {loss:.3}",
        options.targets,
        options.rank,
        100.0 * (predicted / peak - 1.0),
        median * 1e3,
        seconds[0] * 1e3
    );
    let Options { gpu: name, driver, commit, date, targets, rank, .. } = options;
    // With savings that the peers do not have.
    let plus = if options.bits8 || options.offload_embedding { "+" } else { "" };
    let case = format!("{sequences}x{length},{mode}{plus}");
    let system = if options.fp8 { "qlora-fp8" } else { "qlora" };
    append(
        options.out.as_deref(),
        "system,case,mode,tok_s,peak_gb,gpu,driver,commit,date,targets,rank",
        &format!("{system},{case},{speed:.1},{peak:.3},{name},{driver},{commit},{date},{targets},{rank}"),
    )?;
    if options.parts.is_some() {
        let parts = parts::measure(&trainee.model, &plan, sequences, length)?;
        let share = parts.sum() / (median * 1e3);
        println!("parts: {parts:.1?}, {:.1} ms in all: {:.1}% of the step", parts.sum(), 100.0 * share);
        let parts::Parts { products, attention, dequantize, bytes } = parts;
        let ms = format!("{products:.1},{attention:.1},{dequantize:.1},{bytes:.1},{:.1}", parts.sum());
        append(
            options.parts.as_deref(),
            "case,mode,products_ms,attention_ms,dequantize_ms,bytes_ms,sum_ms,step_ms,share,peak_gb,predicted_gb,gpu,driver,commit,date",
            &format!(
                "{case},{ms},{:.1},{share:.3},{peak:.3},{predicted:.3},{name},{driver},{commit},{date}",
                median * 1e3
            ),
        )?;
    }
    if let Some(path) = &options.profile {
        let batch = trainee.batch(sequences, length);
        let mut failed = Ok(());
        let start = Instant::now();
        let entries = gpu.profile(|| {
            failed = trainee.step(&batch).map(drop);
            gpu.synchronize("bench")
        })?;
        failed?;
        let (wall, busy) = (start.elapsed().as_secs_f64() * 1e3, entries.iter().map(|entry| entry.ms).sum::<f64>());
        println!("profile: {wall:.1} ms, of them {busy:.1} in launches");
        for entry in entries.iter().filter(|entry| entry.ms > 0.002 * busy) {
            println!("  {:9.2} ms {:6} x {}", entry.ms, entry.calls, entry.op);
        }
        for entry in &entries {
            let line = format!("{case},{},{},{:.3},{name},{driver},{commit},{date}", entry.op, entry.calls, entry.ms);
            append(Some(path), "case,mode,op,calls,ms,gpu,driver,commit,date", &line)?;
        }
    }
    trainee.model.set_weight_cache(false);
    Ok(())
}

fn main() -> anyhow::Result<()> {
    let options = options()?;
    let device = match cuda::device(0, options.limit) {
        Ok(device) => device,
        // `cargo test` starts benches too.
        Err(error) => {
            println!("nothing measured: {error}");
            return Ok(());
        }
    };
    let workspace = Workspace::new(&device)?;
    let gpu = workspace.gpu().context("the device is a GPU")?.clone();
    gpu.attention().set_enabled(options.attention == "auto");
    let mut trainee = load(&options, &workspace)?;
    for case in &options.cases {
        measure(&options, &gpu, &mut trainee, case)?;
    }
    println!("attention: {}", gpu.attention().describe());
    Ok(())
}
