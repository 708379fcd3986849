#!/usr/bin/env python3
"""Reads a GGUF file of ours with the gguf package and compares it with the Hugging Face folder it was made from.

    scripts/check_gguf.py --gguf FILE --folder FOLDER [--type q8_0] [--transformers TOLERANCE] [--ends 2,5]

Passes (exit code 0) if the file has every tensor of the folder and no other, the bytes of each are exactly what the gguf
package makes of the folder's values (rows of q and k permuted as llama.cpp's converter does), the tokenizer has a token for
every row of the embedding, and --ends are its end tokens. With --transformers, transformers loads the file and its logits are
those of the folder within the tolerance.

Needs gguf (made with 0.19.0), numpy, safetensors; with --transformers also torch and transformers (5.23.0).
"""

import argparse
import json
import sys
from pathlib import Path

import gguf
import numpy as np
from gguf.constants import GGMLQuantizationType as Type


# Whose rows of q and k llama.cpp's converter permutes.
INTERLEAVED = ("llama", "granite", "smollm3", "mistral3")
# Keys that an architecture has besides, and the options that they are.
FACTORS = {
    "granite": {
        "attention.scale": "attention_multiplier", "embedding_scale": "embedding_multiplier",
        "residual_scale": "residual_multiplier", "logit_scale": "logits_scaling",
    }
}


def fail(message):
    print(f"FAILED: {message}")
    sys.exit(1)


def folder_tensors(folder):
    """Name to f32 array; bf16 through its bits, which numpy does not know."""
    tensors = {}
    for path in sorted(folder.glob("model*.safetensors")):
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
            data = file.read()
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            start, end = entry["data_offsets"]
            raw = data[start:end]
            if entry["dtype"] == "BF16":
                array = (np.frombuffer(raw, np.uint16).astype(np.uint32) << 16).view(np.float32)
            else:
                array = np.frombuffer(raw, {"F32": np.float32, "F16": np.float16}[entry["dtype"]]).astype(np.float32)
            tensors[name] = array.reshape(entry["shape"])
    return tensors


def permute(array, heads):
    return array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def value(reader, key):
    field = reader.get_field(key)
    return None if field is None else field.contents()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", required=True, type=Path)
    parser.add_argument("--folder", required=True, type=Path)
    parser.add_argument("--type")
    parser.add_argument("--transformers", type=float)
    parser.add_argument("--ends")
    arguments = parser.parse_args()

    config = json.loads((arguments.folder / "config.json").read_text())
    reader = gguf.GGUFReader(arguments.gguf)
    architecture = value(reader, "general.architecture")
    expected = {"mistral": "llama"}.get(config["model_type"], config["model_type"])
    if architecture != expected:
        fail(f"architecture {architecture}, expected {expected}")
    for key, option in [
        ("block_count", "num_hidden_layers"),
        ("embedding_length", "hidden_size"),
        ("feed_forward_length", "intermediate_size"),
        ("attention.head_count", "num_attention_heads"),
        ("attention.head_count_kv", "num_key_value_heads"),
        ("context_length", "max_position_embeddings"),
        ("vocab_size", "vocab_size"),
    ]:
        if (got := value(reader, f"{architecture}.{key}")) != config[option]:
            fail(f"{key} is {got}, {option} is {config[option]}")
    for key, option in FACTORS.get(architecture, {}).items():
        if (got := value(reader, f"{architecture}.{key}")) != np.float32(config[option]):
            fail(f"{key} is {got}, {option} is {config[option]}")

    names = gguf.get_tensor_name_map(
        next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture),
        config["num_hidden_layers"],
    )
    left = {tensor.name: tensor for tensor in reader.tensors if tensor.name != "rope_freqs.weight"}
    kinds = {}
    for name, array in folder_tensors(arguments.folder).items():
        mapped = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if mapped is None:
            fail(f"the gguf package has no name for {name}")
        if (tensor := left.pop(mapped, None)) is None:
            fail(f"{mapped} ({name}) is missing")
        if list(reversed(tensor.shape.tolist())) != list(array.shape):
            fail(f"{mapped} has shape {tensor.shape}, expected {array.shape}")
        if architecture in INTERLEAVED and ".self_attn.q_proj." in name:
            array = permute(array, config["num_attention_heads"])
        if architecture in INTERLEAVED and ".self_attn.k_proj." in name:
            array = permute(array, config["num_key_value_heads"])
        kind = Type(tensor.tensor_type)
        kinds[kind.name] = kinds.get(kind.name, 0) + 1
        made = np.ascontiguousarray(gguf.quants.quantize(array, kind))
        if made.tobytes() != np.ascontiguousarray(tensor.data).tobytes():
            fail(f"{mapped}: its {kind.name} bytes are not the gguf package's")
        if int(tensor.data_offset) % 32 != 0:
            fail(f"{mapped} begins at {tensor.data_offset}, which is not aligned")
    if left:
        fail(f"superfluous tensors: {sorted(left)}")
    if arguments.type and arguments.type.upper() not in kinds:
        fail(f"no tensor of type {arguments.type}: {kinds}")

    tokens, types = value(reader, "tokenizer.ggml.tokens"), value(reader, "tokenizer.ggml.token_type")
    if len(tokens) != config["vocab_size"] or len(types) != len(tokens):
        fail(f"{len(tokens)} tokens, {len(types)} types, {config['vocab_size']} rows")
    if arguments.ends:
        keys = [f"tokenizer.ggml.{end}_token_id" for end in ("eos", "eot", "eom")]
        ends = {value(reader, key) for key in keys} - {None}
        if ends != {int(end) for end in arguments.ends.split(",")}:
            fail(f"end tokens {ends}, expected {arguments.ends}")
    template = value(reader, "tokenizer.chat_template")
    print(f"{len(reader.tensors)} tensors, {kinds}: all bytes are the gguf package's")
    print(f"tokenizer {value(reader, 'tokenizer.ggml.model')}, {value(reader, 'tokenizer.ggml.pre')}, {len(tokens)} tokens; "
          f"chat template of {len(template or '')} characters")

    if arguments.transformers is not None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(2)
        options = {"dtype": torch.float32}
        ours = AutoModelForCausalLM.from_pretrained(arguments.gguf.parent, gguf_file=arguments.gguf.name, **options).eval()
        theirs = AutoModelForCausalLM.from_pretrained(arguments.folder, **options).eval()
        ids = (torch.arange(40)[None] * 37 + 11) % min(80, config["vocab_size"])
        with torch.no_grad():
            difference = (ours(ids).logits - theirs(ids).logits).abs().max().item()
        print(f"largest difference of a logit in transformers: {difference:.3e}")
        if not difference <= arguments.transformers:
            fail(f"above the tolerance {arguments.transformers}")


if __name__ == "__main__":
    main()
