//! Generation speed and memory on the CPU, in the same terms as `scripts/bench/decode_cpu.py`.
//!
//!     cargo bench --bench decode_cpu -- MODEL [none|int8|int4|nf4]
//!
//! Greedy, 64 tokens of prompt, 128 new tokens; `decode_tok_s` counts from the first new token to the last, `prefill_tok_s` the
//! prompt. Prints one JSON line.

use std::time::Instant;

use qlora::kernels::ops::argmax;
use qlora::kernels::quant::{IntBits, IntConfig, QuantConfig};
use qlora::model::{AdapterChoice, CausalLm, LoadOptions, Quantization};
use qlora::open::{OpenOptions, open_model};
use qlora::trainer::memory;

const PROMPT: usize = 64;
const NEW: usize = 128;

fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    // `cargo test` builds and starts benches too: without a model there is nothing to measure.
    let Some(path) = arguments.first().filter(|argument| !argument.starts_with("--")) else {
        println!("usage: cargo bench --bench decode_cpu -- MODEL [none|int8|int4|nf4]");
        return Ok(());
    };
    let base = arguments.get(1).map_or("nf4", String::as_str);
    let int4 = IntConfig { bits: IntBits::Four, group_size: Some(64), zero_point: true };
    let quantization = match base {
        "none" => Quantization::None,
        "int8" => Quantization::Int8,
        "int4" => Quantization::Int(int4),
        "nf4" => Quantization::Bits4(QuantConfig::default()),
        _ => anyhow::bail!("{base}: expected none, int8, int4 or nf4"),
    };
    let files = open_model(path, &OpenOptions::default())?;
    let model = CausalLm::load(&*files.source, LoadOptions { quantization, ..LoadOptions::default() })?;
    drop(files);
    let vocabulary = model.config().vocab_size as u32;
    let prompt: Vec<u32> = (0..PROMPT as u32).map(|i| i.wrapping_mul(2_654_435_769) % vocabulary).collect();
    let (mut prefill, mut decode) = (Vec::new(), Vec::new());
    for _ in 0..3 {
        let mut cache = model.new_cache(PROMPT + NEW);
        let start = Instant::now();
        let mut next = model.next_logits(&[&prompt], &mut [&mut cache], AdapterChoice::Active)?;
        prefill.push(start.elapsed().as_secs_f64());
        let start = Instant::now();
        for _ in 1..NEW {
            let token = argmax::rows(next.view())?[0].unwrap_or(0);
            next = model.next_logits(&[&[token]], &mut [&mut cache], AdapterChoice::Active)?;
        }
        decode.push(start.elapsed().as_secs_f64());
    }
    let best = |seconds: &[f64]| seconds.iter().copied().fold(f64::INFINITY, f64::min);
    let gb = |bytes: Option<u64>| bytes.unwrap_or_default() as f64 / 1e9;
    println!(
        "{}",
        serde_json::json!({
            "system": format!("qlora, base {base}, compute f32"),
            "decode_tok_s": ((NEW - 1) as f64 / best(&decode) * 10.0).round() / 10.0,
            "prefill_tok_s": (PROMPT as f64 / best(&prefill) * 10.0).round() / 10.0,
            "model_gb": model.memory().total() as f64 / 1e9,
            "peak_rss_gb": gb(memory::peak_resident()),
            "anonymous_gb": gb(memory::anonymous_resident()),
            "prompt": PROMPT,
            "new_tokens": NEW,
        })
    );
    Ok(())
}
