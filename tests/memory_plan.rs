//! The memory planner's arithmetic, on the CPU: what it chooses for which budget. That its peaks are those of a GPU's pool
//! is measured by `benches/train_step.rs`.

mod common;

use common::{add_random_adapter, tiny_config, tiny_model};
use qlora::config::ModelConfig;
use qlora::kernels::weight::FrozenCompute;
use qlora::kernels::{Dtype, Workspace};
use qlora::lora::{AdapterLayout, LoraConfig, TargetModules};
use qlora::model::Keep;
use qlora::model::plan::AttentionWorkspace;
use qlora::model::{BatchShape, CausalLm, Planner};

const RESIDENT: u64 = 1_000_000;

fn model() -> CausalLm {
    let mut model = tiny_model(&tiny_config(), false, 7, Workspace::cpu());
    let target_modules = TargetModules::AllLinear;
    add_random_adapter(&mut model, LoraConfig { r: 4, lora_alpha: 8.0, target_modules, ..LoraConfig::default() }, 3);
    model
}

fn planner(model: &CausalLm, tokens: usize) -> Planner {
    Planner::new(model, BatchShape::uniform(1, tokens), AttentionWorkspace::default(), RESIDENT).unwrap()
}

#[test]
fn less_memory_keeps_less_and_never_more_than_the_budget() {
    let model = model();
    let planner = planner(&model, 4096);
    let (rich, lean) = (planner.richest(), planner.leanest());
    assert!(lean.peak < rich.peak, "{} {}", lean.peak, rich.peak);
    let mut overhead = 0;
    let mut peaks = Vec::new();
    for share in (0..=20).rev() {
        let budget = lean.peak + (rich.peak - lean.peak) * share / 20;
        let plan = planner.plan(budget).unwrap();
        assert!(plan.peak <= budget, "{plan}");
        assert!(plan.overhead_us >= overhead, "less memory is never faster: {plan}");
        // Blocks that keep their activations are at the top, where the backward begins.
        assert!(plan.keep.is_sorted_by_key(|&keep| keep == Keep::Everything), "{plan}");
        overhead = plan.overhead_us;
        peaks.push(plan.peak);
    }
    assert_eq!(planner.plan(rich.peak).unwrap().cached_blocks, model.config().num_hidden_layers);
    assert!(peaks.iter().collect::<std::collections::HashSet<_>>().len() > 2, "several plans are in between");
}

#[test]
fn the_inputs_move_to_the_host_before_the_run_is_refused() {
    let model = model();
    let planner = planner(&model, 4096);
    let lean = planner.leanest();
    let plan = planner.plan(lean.peak).unwrap();
    let offloaded = plan.keep.iter().filter(|&&keep| keep == Keep::Offload).count() as u64;
    // The blocks at the top run their backward when little else is there: they may keep more, or keep it on the device.
    assert!(plan.keep[0] == Keep::Offload && plan.mlp_rows.is_some(), "{plan}");
    let hidden = model.config().hidden_size as u64;
    assert_eq!(plan.pinned, offloaded * 4096 * hidden * 4);
    let error = planner.plan(lean.peak - 1).unwrap_err().to_string();
    assert!(error.contains("4096 tokens needs at least") && error.contains("gradient_accumulation_steps"), "{error}");
}

#[test]
fn no_plan_takes_more_host_memory_than_there_is() {
    let model = model();
    let free = planner(&model, 4096);
    let budget = free.leanest().peak;
    let plan = free.plan(budget).unwrap();
    assert!(plan.pinned > 0, "{plan}");
    for share in [2, 4, 1000] {
        let allowed = plan.pinned / share;
        let tight = free.clone().with_host_memory(allowed);
        for plan in [tight.leanest(), tight.plan(free.richest().peak).unwrap()] {
            assert!(plan.pinned <= allowed, "{plan}");
        }
        assert!(tight.plan(budget).map_or(true, |tight| tight.pinned <= allowed));
        assert!(tight.leanest().peak > free.leanest().peak);
    }
}

#[test]
fn the_longest_sequence_is_found() {
    let model = model();
    let planner_of = |tokens| Ok(planner(&model, tokens));
    let budget = planner(&model, 5000).leanest().peak;
    let longest = Planner::longest_sequence(100_000, budget, planner_of).unwrap();
    // More tokens never take less; peaks grow in steps where pieces are rounded up.
    assert!((4936..6400).contains(&longest), "{longest}");
    assert!(planner(&model, longest).leanest().peak <= budget);
    assert!(planner(&model, longest + 64).leanest().peak > budget);
    assert_eq!(Planner::longest_sequence(3000, budget, planner_of).unwrap(), 3000);
    assert_eq!(Planner::longest_sequence(3000, 1, planner_of).unwrap(), 0);
}

#[test]
fn longer_batches_and_larger_workspaces_take_more() {
    let model = model();
    let peak = |tokens| planner(&model, tokens).leanest().peak;
    assert!(peak(512) < peak(1024) && peak(1024) < peak(4096));
    // Weights and logits of a tiny model aside, memory grows with the tokens.
    let growth = (peak(8192) - peak(4096)) as f64 / (peak(16_384) - peak(8192)) as f64;
    assert!((0.45..0.55).contains(&growth), "{growth}");
    let workspace = AttentionWorkspace { forward: 0, backward: 1 << 40 };
    let large = Planner::new(&model, BatchShape::uniform(1, 512), workspace, RESIDENT).unwrap().leanest().peak;
    assert!(large > 1 << 40);
}

#[test]
fn a_plan_is_applied_and_changes_no_gradient() {
    let mut model = model();
    let plan = planner(&model, 64).leanest();
    let text = plan.to_string();
    assert!(text.contains("host memory") && text.contains("one at a time"), "{text}");
    model.apply_plan(&plan).unwrap();
    assert_eq!(model.keep(), plan.keep);
    let wrong = qlora::model::MemoryPlan { keep: vec![Keep::Input], ..plan };
    assert!(model.apply_plan(&wrong).unwrap_err().to_string().contains("1 choices for"));
}

#[test]
fn a_configuration_alone_gives_the_plans_of_the_model() {
    let model = model();
    let layout = model.adapter().unwrap().layout().clone();
    let attention = AttentionWorkspace { forward: 10_000, backward: 3_000_000 };
    let batch = BatchShape { trained_tokens: 1000, ..BatchShape::uniform(2, 1024) };
    let of_model = Planner::new(&model, batch, attention, RESIDENT).unwrap();
    let dtype = model.workspace().dtype();
    let of_config = Planner::from_config(model.config(), &layout, dtype, batch, attention, RESIDENT);
    let (lean, rich) = (of_model.leanest(), of_model.richest());
    assert_eq!((&of_config.leanest(), &of_config.richest()), (&lean, &rich));
    for share in 0..=8 {
        let budget = lean.peak + (rich.peak - lean.peak) * share / 8;
        assert_eq!(of_config.plan(budget).unwrap(), of_model.plan(budget).unwrap());
    }
}

#[test]
fn fp8_copies_take_the_memory_of_dequantized_weights_and_are_faster() {
    // Blocks of an 8B model: in small ones the roundings cost more than the products gain.
    let config = ModelConfig {
        hidden_size: 4096,
        intermediate_size: 14_336,
        num_attention_heads: 32,
        num_key_value_heads: 8,
        head_dim: 128,
        ..tiny_config()
    };
    let lora = LoraConfig { target_modules: TargetModules::AllLinear, ..LoraConfig::default() };
    let layout = AdapterLayout::for_model(&lora, &config).unwrap();
    let plain = || {
        let batch = BatchShape::uniform(1, 2048);
        Planner::from_config(&config, &layout, Dtype::Bf16, batch, AttentionWorkspace::default(), RESIDENT)
    };
    let fp8 = plain().with_frozen_compute(FrozenCompute::Fp8);
    let direct = fp8.clone().with_four_bits(true);
    let speed = |planner: &Planner| planner.expected_speed(&planner.richest()).tokens_per_second;
    let gain = speed(&fp8) / speed(&plain());
    assert!((1.15..1.5).contains(&gain), "{gain}");
    let (rich, rich_fp8) = (plain().richest(), direct.richest());
    assert_eq!(rich.cached_blocks, rich_fp8.cached_blocks);
    let share = rich_fp8.peak as f64 / rich.peak as f64;
    assert!((0.9..1.1).contains(&share), "{share}");
    // Weights in 4 bits need no 16-bit copy on the way, and two copies of one byte are less than one of two bytes beside it.
    let [plain_lean, fp8_lean, direct_lean] = [plain(), fp8, direct].map(|planner| planner.leanest().peak);
    assert!(direct_lean < plain_lean && plain_lean < fp8_lean, "{direct_lean} {plain_lean} {fp8_lean}");
    assert_eq!(plain().with_four_bits(true).leanest(), plain().leanest(), "it only matters to fp8");
}
