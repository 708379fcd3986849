#!/usr/bin/env python3
"""Training speed of transformers + PEFT + bitsandbytes on the CPU: the figure ours is held against.

    python peft_cpu.py HF_FOLDER [--base nf4|fp32|bf16] [--compute f32|bf16] [--steps 8] ...

Real steps (forward, backward, gradient clipping, AdamW) on random tokens with the loss over all of them, LoRA on
every linear layer. Prints one JSON line: `tok_s` is tokens per second of the median step after the warm-up;
`peak_rss_gb` (GB = 1e9 bytes) the peak resident memory of the whole process, loading included; `peak_anon_gb` the peak
of its anonymous memory during the steps. The first counts the resident pages of files too, and transformers keeps the
model file mapped (0.5 GB for SmolLM2 in f32), so the second is the fairer figure to compare with.
"""

import argparse
import json
import statistics
import threading
import time

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, set_seed

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


def status_gb(field: str) -> float:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 / 1e9 for line in status if line.startswith(field + ":"))


class PeakAnonymous(threading.Thread):
    """Looks at RssAnon every 10 ms: the kernel keeps no peak of it."""

    def __init__(self):
        super().__init__(daemon=True)
        self.peak = 0.0

    def run(self):
        while True:
            self.peak = max(self.peak, status_gb("RssAnon"))
            time.sleep(0.01)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="Hugging Face folder")
    parser.add_argument(
        "--base", choices=["nf4", "fp32", "bf16"], default="nf4", help="nf4 is with double quantization"
    )
    parser.add_argument(
        "--compute", choices=list(DTYPES), default="f32", help="dtype of activations and dequantized weights"
    )
    parser.add_argument("--sequences", type=int, default=2)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--attention", choices=["sdpa", "eager"], default="sdpa")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    args = parser.parse_args()
    if (args.base, args.compute) in (("fp32", "bf16"), ("bf16", "f32")):
        parser.error(
            "a base that is not quantized computes in its own dtype: give --base fp32 or --base bf16 --compute bf16"
        )
    torch.set_num_threads(args.threads)
    set_seed(0)
    kwargs = {}
    if args.base == "nf4":
        kwargs["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=DTYPES[args.compute],
        )
    model = AutoModelForCausalLM.from_pretrained(
        args.model, dtype=DTYPES[args.compute], attn_implementation=args.attention, **kwargs
    )
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    config = LoraConfig(r=args.r, lora_alpha=2 * args.r, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, config).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=2e-4, weight_decay=0.0)
    sampler = PeakAnonymous()
    sampler.start()
    seconds = []
    for _ in range(args.warmup + args.steps):
        ids = torch.randint(0, model.config.vocab_size, (args.sequences, args.length))
        start = time.perf_counter()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    tokens = args.sequences * args.length
    library = " + bitsandbytes" if args.base == "nf4" else ""
    line = {
        "system": f"transformers + PEFT{library}, base {args.base}, compute {args.compute}",
        "tok_s": round(tokens / statistics.median(seconds[args.warmup :]), 1),
        "peak_rss_gb": round(status_gb("VmHWM"), 3),
        "peak_anon_gb": round(sampler.peak, 3),
        "sequences": args.sequences,
        "length": args.length,
        "r": args.r,
        "steps": args.steps,
        "threads": args.threads,
        "attention": args.attention,
        "gradient_checkpointing": args.gradient_checkpointing,
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
