#!/usr/bin/env python3
"""Loads a merged model folder of ours with transformers and compares it with PEFT's own merge of base and adapter.

    scripts/check_merged.py --base FOLDER --adapter FOLDER --merged FOLDER [--tolerance 1e-3]

Passes (exit code 0) if transformers misses no weight and finds none that it does not expect, and the logits of the merged
folder are those of base and adapter under PEFT, in f32, within the tolerance.

Needs torch, transformers, peft (made with transformers 5.23.0, peft 0.21.2).
"""

import argparse
import sys

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True)
    parser.add_argument("--adapter", required=True)
    parser.add_argument("--merged", required=True)
    parser.add_argument("--tolerance", type=float, default=1e-3)
    arguments = parser.parse_args()
    torch.set_num_threads(2)

    merged, info = AutoModelForCausalLM.from_pretrained(arguments.merged, dtype=torch.float32, output_loading_info=True)
    wrong = {key: info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[key]}
    if wrong:
        print(f"FAILED: {wrong}")
        sys.exit(1)
    base = AutoModelForCausalLM.from_pretrained(arguments.base, dtype=torch.float32)
    reference = PeftModel.from_pretrained(base, arguments.adapter).eval()
    ids = torch.arange(40)[None] * 37 % merged.config.vocab_size
    with torch.no_grad():
        expected, got = reference(ids).logits, merged.eval()(ids).logits
    difference = (expected - got).abs().max().item()
    print(f"all weights taken; largest difference of {got.numel()} logits: {difference:.3e} (largest {expected.abs().max():.2f})")
    if not difference <= arguments.tolerance:
        print(f"FAILED: above the tolerance {arguments.tolerance}")
        sys.exit(1)


if __name__ == "__main__":
    main()
