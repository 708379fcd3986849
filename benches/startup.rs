//! From the start of the process to the first result, with a checkpoint on a disk (or in its cache), on a GPU.
//!
//!     cargo bench --features cuda --bench startup -- (--train | --generate) FOLDER [--prompt 128] [--length 2048]
//!         [--out startup.csv] [--gpu H100] [--driver 580] [--commit abc] [--date 2026-11-22]
//!
//! `--train` quantizes a 16-bit checkpoint while it loads (NF4, double quantization), adds adapters of rank 16 to all linear
//! layers and ends when the first optimizer step, of one sequence of `--length` random tokens, is done. `--generate` loads a
//! checkpoint as it is stored and ends when the first token after a prompt of `--prompt` random tokens is on the host. The
//! time counts from when the operating system started the process. `scripts/bench/startup_peft.py` makes the checkpoints, and
//! does the same with transformers, PEFT and bitsandbytes.

#[path = "common/command.rs"]
mod command;
#[path = "common/trainee.rs"]
mod trainee;

use anyhow::Context;
use command::{Arguments, append};
use qlora::formats::HfDirectory;
use qlora::kernels::ops::argmax;
use qlora::kernels::quant::QuantConfig;
use qlora::kernels::{Workspace, cuda};
use qlora::lora::{LoraConfig, TargetModules};
use qlora::model::{AdapterChoice, BatchShape, CausalLm, LoadOptions, Planner, Quantization};
use qlora::trainer::config::Optim;
use trainee::Trainee;

/// Seconds since the process was started, by the kernel's clock, in steps of 10 ms.
fn seconds_alive() -> anyhow::Result<f64> {
    let stat = std::fs::read_to_string("/proc/self/stat")?;
    let uptime = std::fs::read_to_string("/proc/uptime")?;
    // The 22nd field; the second, the name, is in parentheses and may hold spaces.
    let after_name = stat.rsplit(')').next().context("no name in /proc/self/stat")?;
    let ticks: f64 = after_name.split_whitespace().nth(19).context("no start time")?.parse()?;
    let now: f64 = uptime.split_whitespace().next().context("no uptime")?.parse()?;
    // USER_HZ is 100 on every Linux.
    Ok(now - ticks / 100.0)
}

fn report(what: &str) -> anyhow::Result<f64> {
    let seconds = seconds_alive()?;
    println!("{seconds:6.2} s  {what}");
    Ok(seconds)
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::read();
    let (value, number) = (|name: &str| arguments.value(name), |name: &str, or: usize| arguments.number(name, or));
    let (train, folder) = match (value("--train"), value("--generate")) {
        (Some(folder), None) => (true, folder),
        (None, Some(folder)) => (false, folder),
        // `cargo test` starts benches too.
        _ => {
            println!("nothing measured: give --train FOLDER or --generate FOLDER");
            return Ok(());
        }
    };
    report("in main")?;
    let device = cuda::device(0, None)?;
    let workspace = Workspace::new(&device)?;
    let gpu = workspace.gpu().context("the device is a GPU")?.clone();
    report("GPU ready")?;
    let source = HfDirectory::open(&folder)?;
    report("files opened")?;
    let quantization = if train { Quantization::Bits4(QuantConfig::default()) } else { Quantization::None };
    let mut model =
        CausalLm::load_on(&source, LoadOptions { quantization, ..LoadOptions::default() }, workspace.clone())?;
    gpu.synchronize("bench")?;
    report("model loaded")?;
    let case;
    let seconds = if train {
        let lora = LoraConfig { r: 16, target_modules: TargetModules::AllLinear, ..LoraConfig::default() };
        model.add_adapter(lora, 0)?;
        let mut trainee = Trainee::new(model, Optim::AdamwTorch, &workspace)?;
        let length = number("--length", 2048)?;
        let planner = Planner::on_gpu(&trainee.model, BatchShape::uniform(1, length), 0)?;
        let plan = planner.plan(gpu.pool().plannable(None)?)?;
        trainee.model.apply_plan(&plan)?;
        report("adapter, optimizer and plan")?;
        let batch = trainee.batch(1, length);
        let loss = trainee.step(&batch)?;
        gpu.synchronize("bench")?;
        case = format!("first step 1x{length}");
        report(&format!("first step done, loss {loss:.3}"))?
    } else {
        let prompt: Vec<u32> = (0..number("--prompt", 128)? as u32).map(|i| i.wrapping_mul(7919) % 128_000).collect();
        let mut cache = model.new_cache(prompt.len() + 1);
        let logits = model.next_logits(&[&prompt], &mut [&mut cache], AdapterChoice::Active)?;
        let token = argmax::rows(logits.view())?[0].context("no largest logit")?;
        case = format!("first token after {}", prompt.len());
        report(&format!("first token: {token}"))?
    };
    println!("{:.2} GB of GPU memory at most", gpu.pool().peak()? as f64 / 1e9);
    let line = format!("qlora,{case},{seconds:.2},{}", arguments.place());
    append(value("--out").as_deref(), "system,case,seconds,gpu,driver,commit,date", &line)
}
