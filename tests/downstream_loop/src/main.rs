//! A training loop of a user's own: the loss of a model as a candle tensor, candle's `backward` and a candle optimizer, over a
//! base in 4 bits, with LoRA and with DoRA. Checks that both learn, that the base stays, and that what is saved is what ran.

use anyhow::{Context, ensure};
use candle_nn::Optimizer;
use qlora::adapter::{self, SaveOptions};
use qlora::batch::Batch;
use qlora::formats::HfDirectory;
use qlora::kernels::quant::QuantConfig;
use qlora::lora::{LoraConfig, TargetModules};
use qlora::model::{AdapterChoice, CausalLm, LoadOptions, Quantization, TrainPass};

const STEPS: usize = 30;

fn main() -> anyhow::Result<()> {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../fixtures/models/llama");
    for use_dora in [false, true] {
        let quantization = Quantization::Bits4(QuantConfig::default());
        let options = LoadOptions { quantization, ..LoadOptions::default() };
        let mut model = CausalLm::load(&HfDirectory::open(folder)?, options)?;
        let target_modules = TargetModules::AllLinear;
        let lora = LoraConfig { r: 4, lora_alpha: 8.0, use_dora, target_modules, ..LoraConfig::default() };
        model.add_adapter(lora, 1)?;

        // Two documents; all tokens are trained.
        let documents: [Vec<u32>; 2] = [(3..40).collect(), (3..40).rev().collect()];
        let labels = documents.each_ref().map(|ids| ids.iter().map(|&id| i64::from(id)).collect::<Vec<_>>());
        let batch = Batch::from_documents(documents.iter().zip(&labels).map(|(ids, labels)| (&ids[..], &labels[..])));

        let variable = model.adapter().context("an adapter was added")?.variable().clone();
        let mut optimizer = candle_nn::AdamW::new_lr(vec![variable], 1e-2)?;
        let mut losses = Vec::new();
        for step in 0..STEPS {
            let loss = model.loss(&batch, batch.trained_tokens(), TrainPass::seeded(step as u64))?;
            losses.push(loss.to_scalar::<f32>()?);
            optimizer.backward_step(&loss)?;
        }
        let (first, last) = (losses[0], losses[STEPS - 1]);
        println!("downstream loop, use_dora = {use_dora}: loss {first:.4} -> {last:.4}");
        ensure!(last < first / 2.0, "the adapter did not learn: {losses:?}");

        let trained = model.logits(&batch.tokens, &batch.layout, AdapterChoice::Active)?;
        let saved = std::env::temp_dir().join(format!("qlora-downstream-loop-{}-{use_dora}", std::process::id()));
        let adapter = model.adapter().context("it is still there")?;
        adapter::save(&saved, adapter.config(), adapter.layout(), &adapter.values()?, &SaveOptions::default())?;
        model.remove_adapter()?;
        let read = adapter::open_folder(&saved, model.config())?;
        std::fs::remove_dir_all(&saved)?;
        model.load_adapter("saved", &read)?;
        model.activate_adapter("saved")?;
        let loaded = model.logits(&batch.tokens, &batch.layout, AdapterChoice::Active)?;
        let difference = (trained - loaded)?.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()?;
        ensure!(difference < 1e-3, "the saved adapter computes something else: {difference}");
    }
    Ok(())
}
