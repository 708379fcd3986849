//! Training steps of an 8B model on a GPU: speed and peak memory, in the terms of `scripts/bench/peft_cuda.py`.
//!
//!     cargo bench --features cuda --bench train_step -- [--case 4x2048] [--mode free|lean] [--rank 16] [--targets all|qkvo]
//!         [--attention auto|own] [--limit-gib 24] [--layers 32] [--steps 5] [--warmup 2] [--out train_step.csv] [--gpu H100] [--driver 580]
//!         [--commit abc] [--date 2026-11-22]
//!
//! Llama-3.1-8B's shape with random weights, NF4 with double quantization, bf16 activations, AdamW with f32 state, the loss
//! over all tokens. A step is forward, backward, clipping and update, synchronized; tok/s is the tokens over the median
//! step. GB is the most memory in use at one time, by the GPU pool's own counter, over 1e9. `free` keeps all
//! activations and the dequantized weights; `lean` keeps the blocks' inputs in pinned host memory, recomputes, and
//! dequantizes one weight at a time; `plan` is what the planner chooses for the memory there is (`--limit-gib`).

use std::io::Write;
use std::path::Path;
use std::time::Instant;

use anyhow::Context;
use half::bf16;
use qlora::batch::Batch;
use qlora::config::{Architecture, ModelConfig};
use qlora::kernels::ops::rope::{RopeConfig, RopeScaling};
use qlora::kernels::ops::{adamw, grad_norm};
use qlora::kernels::quant::QuantConfig;
use qlora::kernels::weight::PlainData;
use qlora::kernels::{Workspace, cuda};
use qlora::lora::{LoraConfig, ModuleFilter, TargetModules};
use qlora::model::{BatchShape, CausalLm, LoadOptions, Planner, Quantization, TrainPass};
use qlora::source::{PlainTensor, WeightSource};
use rand::{RngExt, SeedableRng};

/// Weights that are drawn when they are read. Their values do not matter to the speed, only that they are not zeros.
#[derive(Debug)]
struct RandomWeights {
    config: ModelConfig,
    shapes: Vec<(String, Vec<usize>)>,
    normal: Vec<bf16>,
}

impl RandomWeights {
    fn new(config: ModelConfig) -> Self {
        let (hidden, mlp, vocab) = (config.hidden_size, config.intermediate_size, config.vocab_size);
        let (q, kv) = (hidden, config.num_key_value_heads * config.head_dim);
        let mut shapes = vec![
            ("model.embed_tokens.weight".to_owned(), vec![vocab, hidden]),
            ("model.norm.weight".to_owned(), vec![hidden]),
            ("lm_head.weight".to_owned(), vec![vocab, hidden]),
        ];
        for layer in 0..config.num_hidden_layers {
            for (name, shape) in [
                ("input_layernorm", vec![hidden]),
                ("post_attention_layernorm", vec![hidden]),
                ("self_attn.q_proj", vec![q, hidden]),
                ("self_attn.k_proj", vec![kv, hidden]),
                ("self_attn.v_proj", vec![kv, hidden]),
                ("self_attn.o_proj", vec![hidden, q]),
                ("mlp.gate_proj", vec![mlp, hidden]),
                ("mlp.up_proj", vec![mlp, hidden]),
                ("mlp.down_proj", vec![hidden, mlp]),
            ] {
                shapes.push((format!("model.layers.{layer}.{name}.weight"), shape));
            }
        }
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(1);
        // The sum of twelve uniform numbers is close enough to a normal one.
        let mut normal = || (0..12).map(|_| rng.random::<f32>()).sum::<f32>() - 6.0;
        let normal = (0..1 << 20).map(|_| bf16::from_f32(0.02 * normal())).collect();
        Self { config, shapes, normal }
    }
}

impl WeightSource for RandomWeights {
    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn path(&self) -> &Path {
        Path::new("random weights")
    }

    fn file_of(&self, _: &str) -> Option<&Path> {
        None
    }

    fn names(&self) -> Vec<String> {
        self.shapes.iter().map(|(name, _)| name.clone()).collect()
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.shapes.iter().find(|(other, _)| other == name).map(|(_, shape)| shape.clone())
    }

    fn read(&self, name: &str) -> qlora::Result<PlainTensor> {
        let shape = self.shape(name).ok_or_else(|| qlora::Error::Invalid(format!("no tensor {name}")))?;
        let len = shape.iter().product();
        let data = match shape.len() {
            1 => vec![bf16::ONE; len],
            _ => {
                let mut data = Vec::with_capacity(len);
                while data.len() < len {
                    data.extend_from_slice(&self.normal[..self.normal.len().min(len - data.len())]);
                }
                data
            }
        };
        Ok(PlainTensor { data: PlainData::Bf16(data), shape })
    }
}

fn llama_8b(layers: usize) -> ModelConfig {
    ModelConfig {
        architecture: Architecture::Llama,
        vocab_size: 128_256,
        hidden_size: 4096,
        intermediate_size: 14_336,
        num_hidden_layers: layers,
        num_attention_heads: 32,
        num_key_value_heads: 8,
        head_dim: 128,
        rms_norm_eps: 1e-5,
        rope: RopeConfig {
            theta: 500_000.0,
            scaling: Some(RopeScaling::Llama3 {
                factor: 8.0,
                low_freq_factor: 1.0,
                high_freq_factor: 4.0,
                original_max_position_embeddings: 8192,
            }),
        },
        max_position_embeddings: 131_072,
        sliding_window: vec![None; layers],
        tie_word_embeddings: false,
        qkv_bias: false,
        o_bias: false,
        mlp_bias: false,
        qk_norm: false,
        bos_token_id: Some(128_000),
        eos_token_ids: vec![128_001],
    }
}

struct Options {
    cases: Vec<(usize, usize)>,
    modes: Vec<String>,
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
}

fn options() -> anyhow::Result<Options> {
    let mut options = Options {
        cases: vec![(1, 2048), (4, 2048), (1, 8192), (2, 512)],
        modes: vec!["free".into(), "lean".into()],
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
    };
    let mut arguments = std::env::args().skip(1).filter(|argument| argument != "--bench");
    while let Some(name) = arguments.next() {
        let value = arguments.next().with_context(|| format!("{name} takes a value"))?;
        match name.as_str() {
            "--case" => {
                let case = |text: &str| -> anyhow::Result<(usize, usize)> {
                    let (batch, length) = text.split_once('x').context("a case is written 4x2048")?;
                    Ok((batch.parse()?, length.parse()?))
                };
                options.cases = value.split(',').map(case).collect::<anyhow::Result<_>>()?;
            }
            "--mode" => options.modes = value.split(',').map(str::to_owned).collect(),
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
            "--limit-gib" => options.limit = Some((value.parse::<f64>()? * (1u64 << 30) as f64) as u64),
            _ => anyhow::bail!("unknown option {name}"),
        }
    }
    Ok(options)
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
    let started = Instant::now();
    let source = RandomWeights::new(llama_8b(options.layers));
    let quantization = Quantization::Bits4(QuantConfig::default());
    let mut model =
        CausalLm::load_on(&source, LoadOptions { quantization, ..LoadOptions::default() }, workspace.clone())?;
    drop(source);
    println!("loaded in {:.1} s, {:.2} GB", started.elapsed().as_secs_f64(), gpu.pool().used()? as f64 / 1e9);
    let target_modules = match options.targets.as_str() {
        "all" => TargetModules::AllLinear,
        _ => TargetModules::Selected(ModuleFilter::List(
            ["q_proj", "k_proj", "v_proj", "o_proj"].map(str::to_owned).to_vec(),
        )),
    };
    let lora =
        LoraConfig { r: options.rank, lora_alpha: 2.0 * options.rank as f64, target_modules, ..LoraConfig::default() };
    model.add_adapter(lora, 0)?;
    let trainable = model.adapter().context("just added")?.layout().len();
    let mut gradient = workspace.zeros_f32(1, trainable)?;
    let (mut m, mut v) = (workspace.zeros_f32(1, trainable)?, workspace.zeros_f32(1, trainable)?);
    let settings = adamw::AdamW { lr: 2e-4, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.0 };
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(0);

    for mode in &options.modes {
        for &(sequences, length) in &options.cases {
            model.set_weight_cache(false);
            gpu.pool().trim()?;
            let planner = Planner::on_gpu(&model, BatchShape::uniform(sequences, length), 0)?;
            let plan = match mode.as_str() {
                "free" => planner.richest(),
                "lean" => planner.leanest(),
                "plan" => planner.plan(gpu.pool().used()? + gpu.pool().available()?)?,
                _ => anyhow::bail!("mode {mode}: expected free, lean or plan"),
            };
            println!("plan: {plan}");
            model.apply_plan(&plan)?;
            gpu.pool().reset_peak()?;
            let mut seconds = Vec::new();
            let mut loss = 0.0;
            for step in 0..options.steps + options.warmup {
                let documents: Vec<Vec<u32>> =
                    (0..sequences).map(|_| (0..length).map(|_| rng.random_range(0..128_256)).collect()).collect();
                let labels: Vec<Vec<i64>> =
                    documents.iter().map(|ids| ids.iter().map(|&id| i64::from(id)).collect()).collect();
                let batch =
                    Batch::from_documents(documents.iter().map(Vec::as_slice).zip(labels.iter().map(Vec::as_slice)));
                gpu.synchronize("bench")?;
                let start = Instant::now();
                gradient.view_mut().fill(0.0)?;
                let items = batch.trained_tokens();
                let sum = model.accumulate_gradients(&batch, items, TrainPass::default(), gradient.view_mut())?;
                let norm = grad_norm::global_norm(gradient.view())?;
                let clip = grad_norm::clip_coefficient(norm, 1.0);
                let adapter = model.adapter().context("just added")?;
                adapter.update(|values| {
                    let (m, v) = (m.view_mut(), v.view_mut());
                    adamw::step(&settings, step as u64 + 1, clip, values, gradient.view(), m, v)
                })?;
                gpu.synchronize("bench")?;
                seconds.push(start.elapsed().as_secs_f64());
                loss = sum.sum / items as f64;
                anyhow::ensure!(loss.is_finite() && norm.is_finite(), "step {step}: loss {loss}, norm {norm}");
            }
            seconds.drain(..options.warmup);
            seconds.sort_by(f64::total_cmp);
            let median = seconds[seconds.len() / 2];
            let speed = (sequences * length) as f64 / median;
            let peak = gpu.pool().peak()? as f64 / 1e9;
            let predicted = plan.peak as f64 / 1e9;
            println!(
                "{sequences}x{length} {mode} {} r={}: {speed:.0} tok/s, {peak:.3} GB (predicted {predicted:.3}, {:+.2}%), \
                 {:.1} ms (fastest {:.1}), loss {loss:.3}",
                options.targets,
                options.rank,
                100.0 * (predicted / peak - 1.0),
                median * 1e3,
                seconds[0] * 1e3
            );
            if let Some(path) = &options.out {
                let is_new = !Path::new(path).exists();
                let mut file = std::fs::OpenOptions::new().create(true).append(true).open(path)?;
                if is_new {
                    writeln!(file, "system,case,mode,tok_s,peak_gb,gpu,driver,commit,date,targets,rank")?;
                }
                writeln!(
                    file,
                    "qlora,{sequences}x{length},{mode},{speed:.1},{peak:.3},{},{},{},{},{},{}",
                    options.gpu, options.driver, options.commit, options.date, options.targets, options.rank
                )?;
            }
            model.set_weight_cache(false);
        }
    }
    println!("attention: {}", gpu.attention().describe());
    Ok(())
}
