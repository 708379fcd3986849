#!/usr/bin/env python3
"""Writes a model of random weights and rows to train it on, both tiny: MODEL (a folder) and ROWS (a JSONL file), without packages.

    scripts/dist/tiny_model.py MODEL ROWS
"""

import json
import pathlib
import random
import shutil
import struct
import sys

TOKENIZER = pathlib.Path(__file__).resolve().parents[2] / "tests/fixtures/tokenizer/llama"
VOCABULARY, HIDDEN, MLP = 420, 64, 128


def main():
    folder, rows = map(pathlib.Path, sys.argv[1:])
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TOKENIZER / name, folder / name)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": HIDDEN,
        "intermediate_size": MLP, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4,
        "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": True,
        "bos_token_id": 1, "eos_token_id": 2, "rope_theta": 10000.0,
    }
    (folder / "config.json").write_text(json.dumps(config))
    layer = "model.layers.0"
    shapes = {"model.embed_tokens": (VOCABULARY, HIDDEN), "model.norm": (HIDDEN,)}
    shapes.update({f"{layer}.{norm}": (HIDDEN,) for norm in ("input_layernorm", "post_attention_layernorm")})
    shapes.update({f"{layer}.self_attn.{part}_proj": (HIDDEN, HIDDEN) for part in "qkvo"})
    shapes.update({f"{layer}.mlp.{part}_proj": (MLP, HIDDEN) for part in ("gate", "up")})
    shapes[f"{layer}.mlp.down_proj"] = (HIDDEN, MLP)
    rng, header, data = random.Random(0), {}, b""
    for name, shape in shapes.items():
        count = shape[0] * (shape[1] if len(shape) > 1 else 1)
        values = [rng.gauss(0, 0.1) if len(shape) > 1 else 1.0 for _ in range(count)]
        header[f"{name}.weight"] = {"dtype": "F32", "shape": shape, "data_offsets": [len(data), len(data) + 4 * count]}
        data += struct.pack(f"<{count}f", *values)
    head = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(head)) + head + data)
    lines = [{"prompt": f"{n} and {n}: ", "completion": str(2 * n)} for n in range(8)]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))


if __name__ == "__main__":
    main()
