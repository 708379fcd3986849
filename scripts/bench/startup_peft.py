#!/usr/bin/env python3
"""From the start of the process to the first result, by transformers + PEFT + bitsandbytes: the peer of benches/startup.rs.

    python startup_peft.py make FOLDER [--layers 32]     # writes FOLDER/bf16 (16 GB) and FOLDER/bnb4 (5.7 GB)
    python startup_peft.py train FOLDER/bf16 [--length 2048] [--out startup.csv] [--date ...]
    python startup_peft.py generate FOLDER/bnb4 [--prompt 128] [--out startup.csv] [--date ...]

The checkpoints have Llama-3.1-8B's shape and random weights. `train` quantizes while it loads (NF4, double quantization), adds
adapters of rank 16 to all linear layers, without gradient checkpointing, and ends when the first AdamW step of one sequence
of random tokens is done; `generate` loads the 4-bit checkpoint and ends when the first token after the prompt is on the host.
The time counts from when the operating system started the process.
"""

import argparse
import importlib.metadata
import json
import pathlib
import time


def seconds_alive() -> float:
    stat = pathlib.Path("/proc/self/stat").read_text()
    ticks = int(stat.rsplit(")", 1)[1].split()[19])  # the 22nd field, the start time; USER_HZ is 100
    return float(pathlib.Path("/proc/uptime").read_text().split()[0]) - ticks / 100


def report(what: str) -> float:
    seconds = seconds_alive()
    print(f"{seconds:6.2f} s  {what}", flush=True)
    return seconds


def make(folder: pathlib.Path, layers: int) -> None:
    import torch
    from peft_cuda import DEVICE, random_weight, settings, write_checkpoint
    from safetensors.torch import save_file

    start = time.perf_counter()
    generator = torch.Generator(DEVICE).manual_seed(1)
    write_checkpoint(folder / "bnb4", layers, generator)
    print(f"4-bit checkpoint written in {time.perf_counter() - start:.1f} s", flush=True)
    plain = folder / "bf16"
    plain.mkdir(parents=True, exist_ok=True)
    config = settings(layers)
    hidden, mlp, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    attention = {"q_proj": (hidden, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden), "o_proj": (hidden, hidden)}
    dense = {"gate_proj": (mlp, hidden), "up_proj": (mlp, hidden), "down_proj": (hidden, mlp)}
    shapes = {f"self_attn.{name}": shape for name, shape in attention.items()}
    shapes |= {f"mlp.{name}": shape for name, shape in dense.items()}
    norm = torch.ones(hidden, dtype=torch.bfloat16)
    tables = {name: (vocab, hidden) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    shards = [{name: random_weight(shape, generator).cpu() for name, shape in tables.items()}]
    shards[0]["model.norm.weight"] = norm
    index, total = {}, 0

    def save(number: int, tensors: dict) -> int:
        name = f"model-{number:05d}.safetensors"
        save_file(tensors, plain / name, metadata={"format": "pt"})
        index.update({key: name for key in tensors})
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())

    total += save(0, shards.pop())
    for first in range(0, layers, 8):
        tensors = {}
        for layer in range(first, min(first + 8, layers)):
            prefix = f"model.layers.{layer}."
            for name in ("input_layernorm", "post_attention_layernorm"):
                tensors[f"{prefix}{name}.weight"] = norm.clone()
            for name, shape in shapes.items():
                tensors[f"{prefix}{name}.weight"] = random_weight(shape, generator).cpu()
        total += save(1 + first // 8, tensors)
    (plain / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": index}))
    config |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "torch_dtype": "bfloat16"}
    (plain / "config.json").write_text(json.dumps(config, indent=2))
    print(f"{total / 1e9:.2f} GB in bf16 written after {time.perf_counter() - start:.1f} s", flush=True)


def train(args) -> tuple[str, float]:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    report("imported")
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(
        args.folder, quantization_config=quantization, dtype=torch.bfloat16, device_map={"": 0}
    )
    report("model loaded")
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, config).train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=2e-4, fused=True)
    ids = torch.randint(0, 128000, (1, args.length), device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    torch.cuda.synchronize()
    return f"first step 1x{args.length}", report(f"first step done, loss {loss.item():.3f}")


def generate(args) -> tuple[str, float]:
    import torch
    from transformers import AutoModelForCausalLM

    report("imported")
    model = AutoModelForCausalLM.from_pretrained(args.folder, dtype=torch.bfloat16, device_map={"": 0})
    report("model loaded")
    ids = torch.randint(0, 128000, (1, args.prompt), device="cuda")
    with torch.inference_mode():
        token = model(input_ids=ids).logits[0, -1].argmax().item()
    return f"first token after {args.prompt}", report(f"first token: {token}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["make", "train", "generate"])
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--out", type=pathlib.Path, help="CSV file to append to")
    for name in ("gpu", "driver", "commit", "date"):
        parser.add_argument(f"--{name}", default="")
    args = parser.parse_args()
    if args.what == "make":
        make(args.folder, args.layers)
        return
    case, seconds = train(args) if args.what == "train" else generate(args)
    packages = {"transformers": "transformers", "peft": "PEFT", "bitsandbytes": "bitsandbytes"}
    if args.what == "generate":
        del packages["peft"]
    system = " + ".join(f"{name} {importlib.metadata.version(package)}" for package, name in packages.items())
    if args.out:
        new = not args.out.exists()
        with args.out.open("a") as file:
            if new:
                file.write("system,case,seconds,gpu,driver,commit,date\n")
            file.write(f"{system},{case},{seconds:.2f},{args.gpu},{args.driver},{args.commit},{args.date}\n")


if __name__ == "__main__":
    main()
