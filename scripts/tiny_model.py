#!/usr/bin/env python3
"""A model folder as from the hub, small enough to train in milliseconds, and rows for it. Standard library only.

    scripts/tiny_model.py MODEL ROWS   # writes a folder and a JSONL file

The Python twin of tests/common/tiny_folder.rs: random weights, a tokenizer of bytes, a ChatML template.
"""

import json
import pathlib
import random
import struct
import sys

CHATML = (
    "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def write_model(folder: pathlib.Path, hidden: int = 32, mlp: int = 48, layers: int = 2, seed: int = 1) -> None:
    """A Llama of four heads; the same seed gives the same weights."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = 256 + len(SPECIAL)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "vocab_size": vocabulary,
        "hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": layers, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": hidden // 4, "rms_norm_eps": 1e-5, "max_position_embeddings": 512,
        "rope_theta": 10000.0, "tie_word_embeddings": False, "torch_dtype": "float32", "eos_token_id": 258,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer()))
    options = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": SPECIAL[2], "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(options))
    (folder / "chat_template.jinja").write_text(CHATML)
    shapes = {"model.embed_tokens": (vocabulary, hidden), "model.norm": (hidden,), "lm_head": (vocabulary, hidden)}
    for layer in range(layers):
        at = f"model.layers.{layer}"
        shapes |= {f"{at}.input_layernorm": (hidden,), f"{at}.post_attention_layernorm": (hidden,)}
        shapes |= {f"{at}.self_attn.{name}_proj": (hidden, hidden) for name in "qo"}
        shapes |= {f"{at}.self_attn.{name}_proj": (hidden // 2, hidden) for name in "kv"}
        shapes |= {f"{at}.mlp.{name}_proj": (mlp, hidden) for name in ("gate", "up")}
        shapes |= {f"{at}.mlp.down_proj": (hidden, mlp)}
    numbers, header, data = random.Random(seed), {}, bytearray()
    for name, shape in shapes.items():
        count, center = shape[0] * (shape[1] if len(shape) == 2 else 1), float(len(shape) == 1)
        begin = len(data)
        data += struct.pack(f"<{count}f", *(center + numbers.uniform(-0.3, 0.3) for _ in range(count)))
        header[f"{name}.weight"] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, len(data)]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)


def tokenizer() -> dict:
    """A byte-level BPE without merges: a token a byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(256, 512))
    letters = {chr(byte if byte in printable else next(others)): byte for byte in range(256)}
    special = [
        {"id": 256 + i, "content": text, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": True}
        for i, text in enumerate(SPECIAL)
    ]  # fmt: skip
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": special, "normalizer": None,
        "pre_tokenizer": byte_level, "post_processor": None, "decoder": byte_level,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "vocab": letters, "merges": []},
    }  # fmt: skip


def write_rows(path: pathlib.Path, count: int, longest: int = 160) -> None:
    """Chats with answers of many lengths."""
    with path.open("w") as file:
        for i in range(count):
            answer = f"answer {i} " + "x" * (i * 37 % longest)
            messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": messages}) + "\n")


def write_run(folder: pathlib.Path) -> None:
    """`model`, `train.jsonl` and `eval.jsonl` in a folder, which is made if it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    write_model(folder / "model")
    write_rows(folder / "train.jsonl", 60)
    write_rows(folder / "eval.jsonl", 7)


if __name__ == "__main__":
    write_model(pathlib.Path(sys.argv[1]))
    write_rows(pathlib.Path(sys.argv[2]), 8)
