//! A base that is streamed from host memory gives a GPU the bits of one that is there.

use std::ops::ControlFlow;
use std::path::Path;

use candle_core::Device;
use qlora::formats::HfDirectory;
use qlora::generate::generate;
use qlora::kernels::Dtype;
use qlora::kernels::cuda::Gpu;
use qlora::kernels::quant::{QuantConfig, QuantType};
use qlora::model::{BasePlacement, CausalLm, Keep, LoadOptions, PlacementKind, Quantization};
use qlora::sampling::GenerationConfig;

use super::common::add_random_adapter;
use super::tiny_folder::{CHATML, write_model_of};
use super::{deterministic_gpu, document, gradient, logits, lora, on_gpu};

/// More blocks than there is room for.
const LAYERS: usize = 5;

fn load(folder: &Path, device: &Device, quantization: Quantization, placement: BasePlacement<'_>) -> CausalLm {
    let source = HfDirectory::open(folder).unwrap();
    let mut options = LoadOptions::default();
    (options.quantization, options.placement) = (quantization, placement);
    let mut model = CausalLm::load_on(&source, options, on_gpu(device, Dtype::F32)).unwrap();
    add_random_adapter(&mut model, lora(0.1), 3);
    model
}

#[test]
fn a_streamed_base_gives_the_bits_of_a_resident_one() {
    let Some(device) = deterministic_gpu() else { return };
    let folder = tempfile::tempdir().unwrap();
    write_model_of(folder.path(), 4, CHATML, LAYERS);
    let pool = || Gpu::of(&device).unwrap().pool().used().unwrap();
    let bits4 = |quant_type, double_quant| {
        Quantization::Bits4(QuantConfig { quant_type, double_quant, ..QuantConfig::default() })
    };
    let kinds =
        [bits4(QuantType::Nf4, true), bits4(QuantType::Nf4, false), bits4(QuantType::Fp4, true), Quantization::None];
    for quantization in kinds {
        let mut whole = load(folder.path(), &device, quantization, BasePlacement::Resident);
        let before = pool();
        let mut streamed = load(folder.path(), &device, quantization, BasePlacement::Streamed);
        let memory = *streamed.base_memory().unwrap();
        assert_eq!((memory.placement, memory.own, memory.host), (PlacementKind::Streamed, 0, memory.whole));
        assert!(memory.slots < memory.whole && streamed.memory().projections == 0, "{memory}");
        assert!(pool() - before >= memory.slots, "{memory}");
        // A step after the other, evaluations and answers between them: every order in which blocks are entered.
        for keep in [Keep::Everything, Keep::Input, Keep::Offload] {
            whole.set_keep(vec![keep; LAYERS]).unwrap();
            streamed.set_keep(vec![keep; LAYERS]).unwrap();
            for seed in 0..3 {
                let same = gradient(&streamed, &[9, 30], seed) == gradient(&whole, &[9, 30], seed);
                assert!(same, "{quantization:?}, {keep:?}, step {seed}");
            }
            let tokens = document(12, 1).0;
            assert_eq!(logits(&streamed, &tokens), logits(&whole, &tokens));
        }
        let config = GenerationConfig { max_new_tokens: 12, ..GenerationConfig::default() };
        let tokens = document(9, 2).0;
        let answer =
            |model: &mut CausalLm| generate(model, &tokens, &config, |_| ControlFlow::Continue(())).unwrap().tokens;
        assert_eq!(answer(&mut streamed), answer(&mut whole));
        assert!(!streamed.runs_decode_graph());
    }
}
