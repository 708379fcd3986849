#!/usr/bin/env python3
"""The model of the main job: Llama-3.1-8B's shape, random weights, stored in 4 bits as bitsandbytes does (5.7 GB).

    python3 model.py FOLDER [--layers 32]
    python3 model.py FOLDER --tiny           # two small layers, made on the CPU: to try the scripts

Needs torch, bitsandbytes and tokenizers. The weights are made and quantized on the GPU. The tokenizer is that of rows.py.
A folder that is complete stays as it is.
"""

import argparse
import json
import pathlib
import sys
import time

import torch

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from peft_cuda import write_checkpoint
from rows import write_tokenizer

TINY = {
    "vocab_size": 2304,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 2048,
    "eos_token_id": 2049,
}


def make(folder: pathlib.Path, layers: int, tiny: bool) -> None:
    complete = folder / "generation_config.json"
    if complete.exists():
        print(f"{folder} is there")
        return
    start = time.perf_counter()
    device = "cpu" if tiny else "cuda"
    shape = TINY if tiny else {}
    write_checkpoint(folder, 2 if tiny else layers, torch.Generator(device).manual_seed(1), shape)
    config = json.loads((folder / "config.json").read_text())
    write_tokenizer(folder, config["vocab_size"])
    ends = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    complete.write_text(json.dumps(ends, indent=2))
    print(f"{folder} written in {time.perf_counter() - start:.1f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    make(args.folder, args.layers, args.tiny)


if __name__ == "__main__":
    main()
