#!/usr/bin/env python3
"""A Llama checkpoint with random weights, stored in 4 bits as bitsandbytes does (NF4, double quantization), as fast as the disk writes.

    python3 random_4bit.py FOLDER --shape 70b [--layers 80]        # 39.6 GB; tiny: to try the scripts

Every layer is a file of its own, with the same random codes in each: 35 GB are written, not computed. Weights have the spread of
a model's (0.02), embedding and head lie between 0.008 and 0.031 in magnitude. For measurements of speed and memory, which do not
depend on the values. The tokenizer is that of main_job/rows.py. Standard library only. A folder that is complete stays as it is.
"""

import argparse
import json
import os
import pathlib
import random
import struct
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent / "main_job"))
from rows import write_tokenizer  # noqa: E402

SHAPES = {  # hidden, MLP, layers, heads, key/value heads, vocabulary
    "8b": (4096, 14336, 32, 32, 8, 128256),
    "70b": (8192, 28672, 80, 64, 8, 128256),
    "tiny": (256, 512, 6, 4, 2, 2304),
}
NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip
BLOCK, NESTED = 64, 256
# With codes drawn evenly, values have 0.59 of a block's largest magnitude as their spread.
OFFSET, SPREAD = 0.034, 0.004


def noise(seed: int, size: int) -> bytes:
    """Random bytes; beyond 64 MB they repeat."""
    return (random.Random(seed).randbytes(min(size, 1 << 26)) * (size // (1 << 26) + 1))[:size]


def bf16(seed: int, elements: int) -> bytes:
    piece = min(elements, 1 << 23)
    values = bytearray(2 * piece)
    values[0::2] = noise(seed, piece)
    # The sign, and an exponent of 2^-7 or 2^-6.
    values[1::2] = noise(seed + 1, piece).translate(bytes(0x3C | (byte & 0x80) for byte in range(256)))
    return (bytes(values) * (elements // piece + 1))[: 2 * elements]


def floats(values: list[float]) -> bytes:
    return struct.pack(f"<{len(values)}f", *values)


def packed(name: str, rows: int, cols: int, seed: int) -> list[tuple[str, str, list[int], bytes]]:
    """The tensors of a 4-bit weight: name, dtype, shape, bytes."""
    n = rows * cols
    blocks = -(-n // BLOCK)
    groups = -(-blocks // NESTED)
    state = {
        "quant_type": "nf4", "blocksize": BLOCK, "dtype": "bfloat16", "shape": [rows, cols],
        "nested_blocksize": NESTED, "nested_dtype": "float32", "nested_offset": OFFSET,
    }  # fmt: skip
    text = json.dumps(state).encode()
    return [
        (name, "U8", [(n + 1) // 2, 1], noise(seed, (n + 1) // 2)),
        (f"{name}.absmax", "U8", [blocks], noise(seed + 1, blocks)),
        (f"{name}.nested_absmax", "F32", [groups], floats([SPREAD]) * groups),
        (f"{name}.nested_quant_map", "F32", [256], floats([(i - 127.5) / 127.5 for i in range(256)])),
        (f"{name}.quant_map", "F32", [16], floats(NF4)),
        (f"{name}.quant_state.bitsandbytes__nf4", "U8", [len(text)], text),
    ]


def write(path: pathlib.Path, tensors: list[tuple[str, str, list[int], bytes]]) -> int:
    # Those with wide elements first, so that all are aligned.
    tensors = sorted(tensors, key=lambda tensor: tensor[1] == "U8")
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, dtype, shape, data in tensors:
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(data)]}
        at += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb", buffering=0) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for *_, data in tensors:
            view = memoryview(data)
            while view:
                view = view[file.write(view) :]
    return at


def make(folder: pathlib.Path, shape: str, layers: int | None) -> None:
    complete = folder / "generation_config.json"
    if complete.exists():
        print(f"{folder} is there")
        return
    start = time.perf_counter()
    hidden, mlp, all_layers, heads, kv_heads, vocab = SHAPES[shape]
    layers = layers or all_layers
    folder.mkdir(parents=True, exist_ok=True)
    kv = hidden // heads * kv_heads
    linear = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (mlp, hidden), "mlp.up_proj": (mlp, hidden),
        "mlp.down_proj": (hidden, mlp),
    }  # fmt: skip
    ones = struct.pack("<H", 0x3F80) * hidden
    weights = {name: packed("", *size, 10 * i) for i, (name, size) in enumerate(linear.items())}
    files, total = {}, 0

    def add(tensors, number: int) -> None:
        nonlocal total
        name = f"model-{number + 1:05}-of-{layers + 1:05}.safetensors"
        total += write(folder / name, tensors)
        files.update({tensor[0]: name for tensor in tensors})

    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        tensors = [(f"{prefix}{norm}.weight", "BF16", [hidden], ones) for norm in ("input_layernorm", "post_attention_layernorm")]
        for name, parts in weights.items():
            tensors += [(f"{prefix}{name}.weight{part}", dtype, size, data) for part, dtype, size, data in parts]
        add(tensors, layer)
    ends = [("model.norm.weight", "BF16", [hidden], ones)]
    for i, name in enumerate(("model.embed_tokens.weight", "lm_head.weight")):
        ends.append((name, "BF16", [vocab, hidden], bf16(1000 + 10 * i, vocab * hidden)))
    add(ends, layers)
    index = {"metadata": {"total_size": total}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    bos, eos, pad = (2048, 2049, 2050) if shape == "tiny" else (128000, 128001, 128004)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "vocab_size": vocab,
        "hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "head_dim": hidden // heads, "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                         "original_max_position_embeddings": 8192},
        "bos_token_id": bos, "eos_token_id": eos, "pad_token_id": pad,
        "quantization_config": {
            "quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": "bfloat16", "bnb_4bit_quant_storage": "uint8",
        },
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    write_tokenizer(folder, vocab)
    complete.write_text(json.dumps({"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": pad}, indent=2))
    os.sync()
    print(f"{folder}: {total / 1e9:.1f} GB written in {time.perf_counter() - start:.1f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--shape", choices=SHAPES, default="70b")
    parser.add_argument("--layers", type=int)
    args = parser.parse_args()
    make(args.folder, args.shape, args.layers)


if __name__ == "__main__":
    main()
