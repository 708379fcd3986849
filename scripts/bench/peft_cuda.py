#!/usr/bin/env python3
"""Training steps of an 8B model by transformers + PEFT + bitsandbytes on a GPU: the peer of benches/train_step.rs.

    python peft_cuda.py [--case 1x2048,4x2048] [--mode free,lean] [--targets all|qkvo] [--rank 16]
                        [--liger | --unsloth] [--no-autocast] [--out benches/results/train_step.csv]

Llama-3.1-8B's shape with random weights, made and quantized on the GPU one matrix at a time: nothing is downloaded and
no 16 GB file is needed. NF4 with double quantization, bf16 compute under autocast (as transformers' Trainer does with
`bf16=True`; `--no-autocast` leaves it out), adapters and AdamW state in f32, fused AdamW, SDPA attention, clipping to
norm 1. Embedding, norms and head stay bf16: `prepare_model_for_kbit_training`, which makes them f32, costs memory and
is left out.

A case is sequences x length, all of them real tokens (no padding), with the loss over all of them. A step is forward,
backward, clipping and update, synchronized; tok/s is the tokens over the median of the measured steps; GB is
`torch.cuda.max_memory_allocated` over 1e9, the base included. `free` checkpoints nothing; `lean` turns gradient
checkpointing on (Unsloth: its own, which moves checkpoints to the host).

`--liger` adds Liger's kernels. `--unsloth` runs Unsloth instead, one mode a run, from a quantized checkpoint of 5.7 GB
that is first written: to a temporary folder, or to the one given by `--checkpoint`, where the next run finds it. Where
they are not installed, a message says so and nothing is measured.

Every measured case appends one line to the file given by `--out`, under the header that benches/train_step.rs writes:
system,case,mode,tok_s,peak_gb,gpu,driver,commit,date,targets,rank. A case that runs out of memory leaves no line.
"""

import argparse
import csv
import datetime
import gc
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import statistics
import subprocess
import tempfile
import time

import torch

DEVICE = "cuda"
COLUMNS = ["system", "case", "mode", "tok_s", "peak_gb", "gpu", "driver", "commit", "date", "targets", "rank"]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]


def settings(layers: int) -> dict:
    """Llama-3.1-8B's configuration as its config.json has it."""
    return {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "tie_word_embeddings": False,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
    }


def random_weight(shape, generator) -> torch.Tensor:
    return torch.empty(*shape, dtype=torch.bfloat16, device=generator.device).normal_(0.0, 0.02, generator=generator)


def random_model(layers: int, generator):
    """The model with its linear layers (but the head) as bitsandbytes' Linear4bit; only one is ever in bf16."""
    import bitsandbytes as bnb
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(**settings(layers))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    # Its frequencies are computed, not loaded, so they would stay on the meta device.
    with torch.device(DEVICE):
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            with torch.device("meta"):
                linear = bnb.nn.Linear4bit(
                    module.in_features,
                    module.out_features,
                    bias=False,
                    compute_dtype=torch.bfloat16,
                    compress_statistics=True,
                    quant_type="nf4",
                )
            weight = random_weight((module.out_features, module.in_features), generator)
            linear.weight = bnb.nn.Params4bit(
                weight, requires_grad=False, compress_statistics=True, quant_type="nf4", module=linear
            ).to(DEVICE)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, linear)
        else:
            for child, parameter in module.named_parameters(recurse=False):
                value = random_weight(parameter.shape, generator) if parameter.dim() > 1 else None
                if value is None:
                    value = torch.ones(parameter.shape, dtype=torch.bfloat16, device=DEVICE)
                setattr(module, child, torch.nn.Parameter(value, requires_grad=False))
    left = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    assert not left, f"without values: {left}"
    # What from_pretrained would set, and PEFT asks for.
    model.is_loaded_in_4bit = True
    model.is_quantized = True
    return model


def peft_model(args, generator):
    from peft import LoraConfig, get_peft_model

    if args.liger:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()
    model = random_model(args.layers, generator)
    targets = "all-linear" if args.targets == "all" else ATTENTION
    config = LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules=targets, task_type="CAUSAL_LM")
    return get_peft_model(model, config)


def write_checkpoint(folder: pathlib.Path, layers: int, generator, shape: dict | None = None) -> None:
    """A checkpoint as transformers saves a model quantized by bitsandbytes, with a tokenizer of a few tokens.

    `shape` replaces values of the configuration."""
    from bitsandbytes.functional import quantize_4bit
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder.mkdir(parents=True, exist_ok=True)
    config = settings(layers) | (shape or {})
    hidden, mlp, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes = {"q_proj": (hidden, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden), "o_proj": (hidden, hidden)}
    shapes |= {"gate_proj": (mlp, hidden), "up_proj": (mlp, hidden), "down_proj": (hidden, mlp)}
    norm = torch.ones(hidden, dtype=torch.bfloat16)
    tensors = {"model.norm.weight": norm}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = random_weight((vocab, hidden), generator).cpu()
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{name}.weight"] = norm.clone()
        for name, shape in shapes.items():
            weight = random_weight(shape, generator)
            packed, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
            key = f"{prefix}{'self_attn' if name in ATTENTION else 'mlp'}.{name}.weight"
            tensors[key] = packed.cpu()
            tensors |= {f"{key}.{part}": tensor.cpu() for part, tensor in state.as_dict(packed=True).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config |= {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "head_dim": hidden // config["num_attention_heads"],
        "pad_token_id": vocab - 252,
        "torch_dtype": "bfloat16",
        "quantization_config": {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": "bfloat16",
            "bnb_4bit_quant_storage": "uint8",
        },
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    special = {"<|begin_of_text|>": 128000, "<|end_of_text|>": 128001, "<|finetune_right_pad_id|>": 128004}
    vocabulary = {chr(97 + i): i for i in range(26)} | {"<unk>": 26} | special
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(list(special))
    tokenizer.save(str(folder / "tokenizer.json"))
    bos, eos, pad = special
    names = {"bos_token": bos, "eos_token": eos, "pad_token": pad, "unk_token": "<unk>"}
    names |= {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 131072}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))


def unsloth_model(args, mode: str, generator):
    from unsloth import FastLanguageModel

    longest = max(length for _, length in args.case)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.checkpoint or pathlib.Path(temporary)
        if not (folder / "tokenizer_config.json").exists():  # the file that is written last
            write_checkpoint(folder, args.layers, generator)
        model, _ = FastLanguageModel.from_pretrained(
            model_name=str(folder), max_seq_length=longest, dtype=torch.bfloat16, load_in_4bit=True
        )
    return FastLanguageModel.get_peft_model(
        model,
        r=args.rank,
        lora_alpha=2 * args.rank,
        lora_dropout=0,
        bias="none",
        target_modules=ATTENTION + (MLP if args.targets == "all" else []),
        use_gradient_checkpointing="unsloth" if mode == "lean" else False,
        random_state=0,
    )


def measure(model, parameters, case: tuple[int, int], args) -> tuple[list[float], float, float]:
    """Seconds of every step with the warm-up, peak memory in bytes, last loss."""
    if args.unsloth:
        # Else the second case would run kernels compiled for any shape.
        torch.compiler.reset()
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    optimizer = torch.optim.AdamW(parameters, lr=2e-4, weight_decay=0.0, fused=True)
    vocabulary = model.config.vocab_size
    seconds, loss = [], None
    for _ in range(args.warmup + args.steps):
        ids = torch.randint(0, vocabulary, case, device=DEVICE)
        torch.cuda.synchronize()
        start = time.perf_counter()
        with torch.autocast(torch.device(DEVICE).type, torch.bfloat16, enabled=args.autocast):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    assert torch.isfinite(loss), f"loss {loss}"
    return seconds, torch.cuda.max_memory_allocated(), loss.item()


def system(args) -> str:
    packages = ["unsloth"] if args.unsloth else ["transformers", "peft", "bitsandbytes"]
    packages += ["liger_kernel"] if args.liger else []
    names = {"peft": "PEFT", "liger_kernel": "Liger", "unsloth": "Unsloth"}
    words = [f"{names.get(package, package)} {importlib.metadata.version(package)}" for package in packages]
    return " + ".join(words) + ("" if args.autocast else " (no autocast)")


def driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()


def commit() -> str:
    """Of the scripts: $QLORA_COMMIT where the files travelled without their repository."""
    if os.environ.get("QLORA_COMMIT"):
        return os.environ["QLORA_COMMIT"]
    here = pathlib.Path(__file__).parent
    result = subprocess.run(["git", "-C", here, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return result.stdout.strip() or "unknown"


def append(path: pathlib.Path, row: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists() or path.stat().st_size == 0
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


def arguments():
    def cases(text: str) -> list[tuple[int, int]]:
        return [tuple(int(part) for part in case.split("x")) for case in text.split(",")]

    def modes(text: str) -> list[str]:
        wanted = text.split(",")
        if not set(wanted) <= {"free", "lean"}:
            raise argparse.ArgumentTypeError("modes are free and lean")
        return wanted

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", type=cases, default=cases("1x2048,4x2048,1x8192,2x512"), help="such as 4x2048,2x512")
    parser.add_argument("--mode", type=modes, default=["free", "lean"], help="free, lean or both: free,lean")
    parser.add_argument("--targets", choices=["all", "qkvo"], default="all")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--liger", action="store_true")
    parser.add_argument("--unsloth", action="store_true")
    parser.add_argument("--no-autocast", dest="autocast", action="store_false")
    parser.add_argument("--checkpoint", type=pathlib.Path, help="folder that keeps the checkpoint --unsloth reads")
    parser.add_argument("--out", type=pathlib.Path, help="CSV file to append to")
    args = parser.parse_args()
    if args.unsloth and (args.liger or len(args.mode) > 1):
        parser.error("--unsloth goes without --liger and with one --mode")
    return args


def main() -> None:
    args = arguments()
    wanted = ["unsloth"] if args.unsloth else ["bitsandbytes", "peft"] + (["liger_kernel"] if args.liger else [])
    missing = [package for package in wanted if importlib.util.find_spec(package) is None]
    if missing:
        print(f"nothing measured: {', '.join(missing)} not installed")
        return
    if args.unsloth:
        # It patches transformers and wants to be imported before it.
        import unsloth  # noqa: F401
    torch.manual_seed(0)
    generator = torch.Generator(DEVICE).manual_seed(1)
    start = time.perf_counter()
    model = unsloth_model(args, args.mode[0], generator) if args.unsloth else peft_model(args, generator)
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    dtypes = ", ".join(sorted({str(parameter.dtype).removeprefix("torch.") for parameter in parameters}))
    name = system(args)
    print(
        f"{name} on {torch.cuda.get_device_name()}: loaded in {time.perf_counter() - start:.1f} s,"
        f" {torch.cuda.memory_allocated() / 1e9:.2f} GB, {sum(p.numel() for p in parameters):,} trained in {dtypes}",
        flush=True,
    )
    for mode in args.mode:
        if not args.unsloth:
            if mode == "lean":
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            else:
                model.gradient_checkpointing_disable()
        for sequences, length in args.case:
            case = f"{sequences}x{length}"
            label = f"{case} {mode} {args.targets} r={args.rank}"
            try:
                seconds, peak, loss = measure(model, parameters, (sequences, length), args)
            except torch.cuda.OutOfMemoryError:
                model.zero_grad()
                print(f"{label}: out of memory", flush=True)
                continue
            median = statistics.median(seconds[args.warmup :])
            speed = sequences * length / median
            print(
                f"{label}: {speed:.0f} tok/s, {peak / 1e9:.2f} GB, {median * 1e3:.1f} ms"
                f" (fastest {min(seconds[args.warmup :]) * 1e3:.1f}, first {seconds[0]:.1f} s), loss {loss:.3f}",
                flush=True,
            )
            if args.out:
                row = {
                    "system": name,
                    "case": case,
                    "mode": mode,
                    "tok_s": f"{speed:.1f}",
                    "peak_gb": f"{peak / 1e9:.3f}",
                    "gpu": torch.cuda.get_device_name(),
                    "driver": driver(),
                    "commit": commit(),
                    "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
                    "targets": args.targets,
                    "rank": args.rank,
                }
                append(args.out, row)


if __name__ == "__main__":
    main()
