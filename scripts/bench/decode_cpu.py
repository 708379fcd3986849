#!/usr/bin/env python3
"""Generation speed of transformers on the CPU: the figure benches/decode_cpu.rs is held against.

    python decode_cpu.py HF_FOLDER [--dtype f32|bf16] [--threads 2]

Greedy, 64 tokens of prompt, 128 new tokens, the same tokens of prompt. `decode_tok_s` counts from the first new token to the
last, with the key-value cache and one forward a token; the best of three. Prints one JSON line.
"""

import argparse
import json
import time

import torch
from transformers import AutoModelForCausalLM

PROMPT, NEW = 64, 128
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


def status_gb(field: str) -> float:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 / 1e9 for line in status if line.startswith(field + ":"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="Hugging Face folder")
    parser.add_argument("--dtype", choices=list(DTYPES), default="f32")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=DTYPES[args.dtype])
    model.eval()
    vocabulary = model.config.vocab_size
    prompt = torch.tensor([[(i * 2654435769 % 2**32) % vocabulary for i in range(PROMPT)]])
    prefill, decode = [], []
    with torch.inference_mode():
        for _ in range(3):
            start = time.perf_counter()
            out = model(prompt, use_cache=True, logits_to_keep=1)
            prefill.append(time.perf_counter() - start)
            start = time.perf_counter()
            for _ in range(NEW - 1):
                token = out.logits[:, -1].argmax(-1, keepdim=True)
                out = model(token, past_key_values=out.past_key_values, use_cache=True)
            decode.append(time.perf_counter() - start)
    result = {
        "system": f"transformers, {args.dtype}",
        "decode_tok_s": round((NEW - 1) / min(decode), 1),
        "prefill_tok_s": round(PROMPT / min(prefill), 1),
        "peak_rss_gb": round(status_gb("VmHWM"), 3),
        "anonymous_gb": round(status_gb("RssAnon"), 3),
        "prompt": PROMPT,
        "new_tokens": NEW,
        "threads": args.threads,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
