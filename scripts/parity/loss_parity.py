#!/usr/bin/env python3
"""20 optimizer steps on SmolLM2-135M-Instruct by transformers + PEFT + bitsandbytes: the reference for loss parity.

    python loss_parity.py HF_FOLDER [tests/fixtures/parity/smollm2_20_steps.json]

Settings: base in NF4 with double quantization (blocksize 64, nested 256), quantized from f32 weights, f32 compute;
LoRA r = 8, alpha = 16, all-linear, no dropout, adapters f32; AdamW (lr 2e-4, betas 0.9 and 0.999, eps 1e-8, weight
decay 0); linear schedule without warmup: step k = 0..19 has lr 2e-4 * (20 - k) / 20; 2 micro-batches of one or two
documents a step; loss = sum over the trained tokens of both micro-batches / their number; gradients clipped to norm
1.

The file holds the documents (token ids of rows of examples/data/demo_train.jsonl in the chat template, and the number
of leading tokens that are not trained), and for every step lr, loss (before the update) and gradient norm (before
clipping) for three bases:
* `nf4`: as bitsandbytes' CPU backend quantizes. About 2 in 1000 of its codes of absmax values are not the nearest of
  the 256 levels, as they should be (3700 of 1658880 here). The nested offset is the f32 mean of a layer's absmax
  values in PyTorch's order of summation.
* `nf4_nearest`: the same with every one of these codes set to the nearest level: what a correct quantizer gives.
* `f32`: no quantization.

The initial adapter is a formula, so that it need not be stored. B is zero. Element i (row-major, from 0) of the A
named n (as in the adapter file: `base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight`), of shape [r, in],
all integers modulo 2^64:

    seed = FNV-1a of the bytes of n    h = 0xcbf29ce484222325; for each byte b: h = (h xor b) * 0x100000001b3
    z = seed + (i + 1) * 0x9e3779b97f4a7c15                                           (splitmix64)
    z = (z xor z >> 30) * 0xbf58476d1ce4e5b9
    z = (z xor z >> 27) * 0x94d049bb133111eb
    z = z xor z >> 31
    A[i] = f32(((z >> 40) * 2^-23 - 1) * bound)    bound = f32(1 / sqrt(f64(in)))

The factor in front of `bound` is exact in f32, the product is one f32 multiplication: the same bits on every machine.
`initial_a_check` in the file has the first four values of two tensors.
"""

import json
import pathlib
import sys
import time

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer

import nf4_base
from demo_task import example, pad, rows

STEPS, ACCUMULATION, RATE = 20, 2, 2e-4
CHECKED = {
    "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": 576,
    "base_model.model.model.layers.29.mlp.down_proj.lora_A.weight": 1536,
}


def initial_a(name: str, rows: int, width: int) -> np.ndarray:
    seed = 0xCBF29CE484222325
    for byte in name.encode():
        seed = (seed ^ byte) * 0x100000001B3 % 2**64
    z = np.uint64(seed) + np.arange(1, rows * width + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ z >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ z >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    z = z ^ z >> np.uint64(31)
    unit = (z >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-23) - np.float32(1)
    return (unit * np.float32(1 / np.sqrt(np.float64(width)))).reshape(rows, width)


def build(source: str, base: str):
    model = nf4_base.load(source, base)
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.data.copy_(torch.from_numpy(initial_a(name.replace(".default", ""), *parameter.shape)))
        elif "lora_B" in name:
            parameter.data.zero_()
    return model.train()  # in eval mode bitsandbytes may compute in bf16


def micro_batches(tokenizer) -> list[list[dict]]:
    examples = iter([example(tokenizer, messages) for messages in rows("demo_train.jsonl")])
    batches = []
    for index in range(STEPS * ACCUMULATION):
        documents = [next(examples) for _ in range(1 if index % 3 == 1 else 2)]
        batches.append([{"ids": ids, "prompt": prompt} for ids, prompt in documents])
    return batches


def train(model, batches: list[list[dict]], pad_id: int) -> list[dict]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    trace = []
    for step in range(STEPS):
        window = batches[step * ACCUMULATION : (step + 1) * ACCUMULATION]
        trained = sum(len(d["ids"]) - d["prompt"] for documents in window for d in documents)
        total = 0.0
        for documents in window:
            ids = pad([d["ids"] for d in documents], pad_id)
            mask = pad([[1] * len(d["ids"]) for d in documents], 0)
            labels = pad([[-100] * d["prompt"] + d["ids"][d["prompt"] :] for d in documents], -100)
            out = model(input_ids=ids, attention_mask=mask, labels=labels, num_items_in_batch=trained, use_cache=False)
            out.loss.backward()
            total += out.loss.item()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0).item()
        rate = RATE * (STEPS - step) / STEPS
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        trace.append({"lr": rate, "trained_tokens": trained, "loss": round(total, 7), "grad_norm": round(norm, 7)})
        print(f"step {step + 1:2}  loss {total:.6f}  grad norm {norm:.5f}", flush=True)
    return trace


def write(result: dict, out: pathlib.Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    head = {k: v for k, v in result.items() if k not in ("micro_batches", "steps")}
    lines = [f'  "{k}": {json.dumps(v)}' for k, v in head.items()]
    lines.append(
        '  "micro_batches": [\n' + ",\n".join("    " + json.dumps(b) for b in result["micro_batches"]) + "\n  ]"
    )
    traces = [
        f'    "{base}": [\n' + ",\n".join("      " + json.dumps(s) for s in trace) + "\n    ]"
        for base, trace in result["steps"].items()
    ]
    lines.append('  "steps": {\n' + ",\n".join(traces) + "\n  }")
    out.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def main() -> None:
    torch.set_num_threads(1)  # the same order of summation everywhere
    source = sys.argv[1]
    out = pathlib.Path(sys.argv[2] if len(sys.argv) > 2 else "tests/fixtures/parity/smollm2_20_steps.json")
    tokenizer = AutoTokenizer.from_pretrained(source)
    batches = micro_batches(tokenizer)
    result = {
        "model": "SmolLM2-135M-Instruct (Q4_1 GGUF, widened to f32)",
        "settings": {
            "r": 8,
            "lora_alpha": 16,
            "target_modules": "all-linear",
            "lora_dropout": 0.0,
            "learning_rate": RATE,
            "lr_scheduler_type": "linear",
            "adam_beta1": 0.9,
            "adam_beta2": 0.999,
            "adam_epsilon": 1e-8,
            "weight_decay": 0.0,
            "max_grad_norm": 1.0,
            "gradient_accumulation_steps": ACCUMULATION,
        },
        "initial_a_check": {name: initial_a(name, 8, width)[0, :4].tolist() for name, width in CHECKED.items()},
        "micro_batches": batches,
        "steps": {},
    }
    for base in ("nf4", "nf4_nearest", "f32"):
        start = time.time()
        model = build(source, base)
        result["steps"][base] = train(model, batches, tokenizer.pad_token_id)
        print(f"{base}: {time.time() - start:.0f} s", flush=True)
    write(result, out)


if __name__ == "__main__":
    main()
