#!/usr/bin/env python3
"""Runs two builds of the programs on the CPU and compares what they make, bit for bit.

    scripts/same_bits.py OLD NEW [MODEL ...] [--steps N] [--work FOLDER]

OLD and NEW are folders with the command `qlora` (`target/debug`, or a copy of it from another commit), or, from before there was
one, with the examples `finetune`, `generate`, `merge`, `quantize` and `inspect`. Every program runs on tiny random models of four architectures
(made here with Python's standard library) and on each MODEL given (a GGUF file or a folder with a chat template):

- training: 20 steps (`--steps`) over NF4 with dropout and gradient accumulation, once keeping every activation and once recomputing
  them. Compared: losses and gradient norms of every step as printed to the log, adapter and optimizer state (the sums of all
  gradients and their squares) of the checkpoint;
- `generate`: greedy tokens, with and without the trained adapter;
- `merge`: the files of a folder, and GGUF files as f32 and q8_0;
- `quantize`: the files of the NF4 folder;
- `inspect`: its text, planned memory included.

Ends with 1 and names what differs; nothing may. For changes that must not change results.
"""

import argparse
import hashlib
import json
import pathlib
import random
import shutil
import struct
import subprocess
import sys
import tempfile

ROWS = [("Name the colour of the sky.", "Blue."), ("Count to three.", "One, two, three."), ("Say hello.", "Hello there!")]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}"
)
SIZES = dict(
    vocab_size=259, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    head_dim=16, max_position_embeddings=512, rms_norm_eps=1e-5, rope_theta=10000.0, hidden_act="silu", torch_dtype="float32",
    bos_token_id=257, eos_token_id=258,
)
# Together they have every option of a block: biases, windows in all or some layers, norms of q and k, a tied head, scaled rope.
MODELS = {
    "llama": dict(
        architectures=["LlamaForCausalLM"], model_type="llama", tie_word_embeddings=False, attention_bias=True, mlp_bias=True,
        rope_scaling=dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                          original_max_position_embeddings=8192),
    ),
    "mistral": dict(architectures=["MistralForCausalLM"], model_type="mistral", sliding_window=11, tie_word_embeddings=False),
    "qwen2": dict(architectures=["Qwen2ForCausalLM"], model_type="qwen2", tie_word_embeddings=True),
    "qwen3": dict(
        architectures=["Qwen3ForCausalLM"], model_type="qwen3", tie_word_embeddings=True, use_sliding_window=True,
        sliding_window=9, layer_types=["full_attention", "sliding_attention", "full_attention"],
    ),
}


def tensors(config):
    """Names and shapes of a model's tensors."""
    hidden, mlp, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    qkv_bias = config["model_type"] == "qwen2" or config.get("attention_bias", False)
    o_bias, mlp_bias = config.get("attention_bias", False), config.get("mlp_bias", False)
    yield "model.embed_tokens.weight", [config["vocab_size"], hidden]
    for layer in range(config["num_hidden_layers"]):
        block = f"model.layers.{layer}"
        for name, rows, cols, bias in [
            ("self_attn.q_proj", q, hidden, qkv_bias), ("self_attn.k_proj", kv, hidden, qkv_bias),
            ("self_attn.v_proj", kv, hidden, qkv_bias), ("self_attn.o_proj", hidden, q, o_bias),
            ("mlp.gate_proj", mlp, hidden, mlp_bias), ("mlp.up_proj", mlp, hidden, mlp_bias),
            ("mlp.down_proj", hidden, mlp, mlp_bias),
        ]:
            yield f"{block}.{name}.weight", [rows, cols]
            if bias:
                yield f"{block}.{name}.bias", [rows]
        yield f"{block}.input_layernorm.weight", [hidden]
        yield f"{block}.post_attention_layernorm.weight", [hidden]
        if config["model_type"] == "qwen3":
            yield f"{block}.self_attn.q_norm.weight", [head]
            yield f"{block}.self_attn.k_norm.weight", [head]
    yield "model.norm.weight", [hidden]
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", [config["vocab_size"], hidden]


def write_model(folder, config, seed):
    rng = random.Random(seed)
    header, body = {}, bytearray()
    for name, shape in tensors(config):
        count = shape[0] * (shape[1] if len(shape) > 1 else 1)
        center = 1.0 if name.endswith("norm.weight") else 0.0
        data = struct.pack(f"<{count}f", *(center + rng.uniform(-0.25, 0.25) for _ in range(count)))
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + body)
    (folder / "config.json").write_text(json.dumps(config))
    others = iter(range(256, 512))
    printable = lambda b: 0x21 <= b <= 0x7E or 0xA1 <= b <= 0xAC or 0xAE <= b <= 0xFF
    vocabulary = {(chr(b) if printable(b) else chr(next(others))): b for b in range(256)}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    added = [
        {"id": 256 + i, "content": text, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        for i, text in enumerate(SPECIAL)
    ]
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": byte_level, "post_processor": None, "decoder": byte_level,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
                  "fuse_unk": False, "byte_fallback": False, "vocab": vocabulary, "merges": []},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    options = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": SPECIAL[2], "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(options))
    (folder / "chat_template.jinja").write_text(TEMPLATE)


def run(programs, name, *args, cwd):
    command = programs / "qlora"
    start = [command, {"finetune": "train"}.get(name, name)] if command.is_file() else [programs / name]
    line = [*map(str, start), *map(str, args)]
    done = subprocess.run(line, cwd=cwd, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(line)} in {cwd}:\n{done.stdout}\n{done.stderr}")
    return done.stdout


def digest(data):
    return hashlib.sha256(data).hexdigest()[:16]


def files(folder, keep):
    return {str(f.relative_to(folder)): digest(f.read_bytes()) for f in sorted(folder.rglob("*")) if f.is_file() and keep(f.name)}


def losses(folder):
    """What a log says about the steps, without times."""
    found = {}
    for log in sorted(folder.rglob("*.jsonl")):
        rows = [json.loads(line) for line in log.read_text().splitlines()]
        kept = [{k: row[k] for k in ("step", "loss", "grad_norm", "learning_rate") if k in row} for row in rows]
        found[str(log.relative_to(folder))] = kept
    return found


def results(programs, model, cwd, steps):
    """Everything that is compared, by a name for messages."""
    made = {}
    is_binary = lambda name: name.endswith((".safetensors", ".gguf")) or name in ("config.json", "adapter_config.json")
    rows = "\n".join(
        json.dumps({"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}) for q, a in ROWS * 8
    )
    (cwd / "rows.jsonl").write_text(rows + "\n")
    (cwd / "prompts.jsonl").write_text("".join(json.dumps({"prompt": q}) + "\n" for q, _ in ROWS))
    for checkpointing in ("false", "true"):
        out = f"run-{checkpointing}"
        (cwd / f"{out}.toml").write_text(
            f"""
[model]
model_name_or_path = "{model}"
device = "cpu"
[lora]
r = 8
lora_dropout = 0.05
target_modules = "all-linear"
[data]
train_file = "rows.jsonl"
max_length = 128
[training]
output_dir = "{out}"
max_steps = {steps}
per_device_train_batch_size = 2
gradient_accumulation_steps = 2
gradient_checkpointing = {checkpointing}
learning_rate = 1e-3
logging_steps = 1
save_steps = {steps}
"""
        )
        run(programs, "finetune", f"{out}.toml", cwd=cwd)
        made[f"finetune, checkpointing {checkpointing}"] = files(cwd / out, is_binary) | losses(cwd / out)
    adapter = sorted((cwd / "run-false").rglob("adapter_model.safetensors"))[0].parent
    for name, options in [("the base", []), ("the adapter", ["--adapter", adapter])]:
        arguments = ["--model", model, *options, "--device", "cpu", "--batch", "prompts.jsonl", "--output", "answers.jsonl"]
        run(programs, "generate", *arguments, "--max-new-tokens", 24, cwd=cwd)
        made[f"generate with {name}"] = {"answers": (cwd / "answers.jsonl").read_text()}
    kinds = [("folder", []), ("f32.gguf", ["--outtype", "f32"]), ("q8_0.gguf", ["--outtype", "q8_0"])]
    # GGUF has no place for windows in some layers.
    layered = model.is_dir() and "layer_types" in json.loads((model / "config.json").read_text())
    for kind, options in kinds[:1] if layered else kinds:
        out = cwd / f"merged.{kind}"
        run(programs, "merge", "--base", model, "--adapter", adapter, "--out", out.name, *options, cwd=cwd)
        made[f"merge to {kind}"] = {"file": digest(out.read_bytes())} if out.is_file() else files(out, is_binary)
    if model.is_dir():
        run(programs, "quantize", model, "nf4", cwd=cwd)
        made["quantize"] = files(cwd / "nf4", is_binary)
    made["inspect"] = {"text": run(programs, "inspect", model, cwd=cwd)}
    return made


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=pathlib.Path)
    parser.add_argument("new", type=pathlib.Path)
    parser.add_argument("models", nargs="*", type=pathlib.Path)
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps of a training run")
    parser.add_argument("--work", type=pathlib.Path, help="where to run (a temporary folder)")
    options = parser.parse_args()
    work = options.work or pathlib.Path(tempfile.mkdtemp())
    shutil.rmtree(work / "models", ignore_errors=True)
    models = {}
    for seed, (name, config) in enumerate(MODELS.items()):
        models[name] = (work / "models" / name).resolve()
        write_model(models[name], SIZES | config, seed)
    models |= {path.stem: path.resolve() for path in options.models}
    differences, compared = 0, 0
    for name, model in models.items():
        both = []
        for side, programs in (("old", options.old), ("new", options.new)):
            # The same relative paths on both sides, as files and texts hold them.
            cwd = work / name / side
            shutil.rmtree(cwd, ignore_errors=True)
            cwd.mkdir(parents=True)
            both.append(results(programs.resolve(), model, cwd, options.steps))
        for what in both[0]:
            old, new = both[0][what], both[1][what]
            compared += len(old)
            for part in sorted(set(old) | set(new)):
                if old.get(part) != new.get(part):
                    differences += 1
                    print(f"{name}: {what}: {part} differs\n  old: {old.get(part)}\n  new: {new.get(part)}")
        print(f"{name}: compared " + ", ".join(f"{what} ({len(parts)})" for what, parts in both[0].items()), flush=True)
    print(f"{compared} results compared, {differences} differ")
    sys.exit(1 if differences else 0)


if __name__ == "__main__":
    main()
