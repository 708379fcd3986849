"""How fast rows are ready to train on, against `encode_batch` of the same tokenizer on the same rows and cores.

    PY scripts/bench/prepare_rows.py --qlora target/release/qlora --rows 1000000 --csv benches/results/prepare_rows.csv

`qlora train` starts on the rows, as a user starts it: they are read, parsed, tokenized, masked, kept in the cache on the disk, and
one step is trained on a tiny model. A second start takes them from the cache. What is compared is the time that the command itself
states for its data, reading and writing files included; encode_batch gets the texts in memory and does nothing else. The two are run in
turns, `--pairs` times. Fails if the median share is below `--bar`. On a machine that does other work, too, the seconds say little: the
processor's seconds are stated beside them (of qlora those of the whole command), and count for the bar with `--busy`.

Needs tokenizers (PyPI; with transformers and gguf for a tokenizer out of a GGUF file). Only Linux states the peak memory.
"""

import argparse
import array
import csv
import json
import os
import pathlib
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time

TOKENIZE = """
import json, sys, time
from tokenizers import Tokenizer
tokenizer = Tokenizer.from_file(sys.argv[1])
texts = [json.loads(line)["text"] for line in open(sys.argv[2], encoding="utf-8")]
start, cpu, tokens = time.monotonic(), time.process_time(), 0
for i in range(0, len(texts), 16384):
    tokens += sum(len(encoding) for encoding in tokenizer.encode_batch(texts[i : i + 16384]))
print(json.dumps({"seconds": time.monotonic() - start, "cpu": time.process_time() - cpu, "tokens": tokens}))
"""


def write_rows(path: pathlib.Path, rows: int) -> None:
    """Sentences of made-up and common words, numbers and punctuation: 100 to 1,000 characters."""
    random.seed(1)
    syllables = [a + b for a in "bdfgklmnprstvw" for b in ("a", "e", "i", "o", "u", "an", "er", "ing")]
    words = ["".join(random.choices(syllables, k=random.choice([1, 1, 2, 2, 3]))) for _ in range(20_000)]
    words += "the of and to in a is that it for was on are as with they be at this have from or by one had not but what all were".split() * 400
    with path.open("w", encoding="utf-8") as file:
        for i in range(rows):
            length, parts, size = random.randrange(100, 1000), [str(i)], 0
            while size < length:
                word = random.choice(words) if random.random() > 0.04 else str(random.randrange(10_000))
                parts.append(word + random.choice(["", "", "", "", "", "", ",", "."]))
                size += len(word) + 1
            file.write(json.dumps({"text": " ".join(parts)}) + "\n")


def write_model(folder: pathlib.Path, tokenizer: pathlib.Path) -> None:
    """A Llama of one layer with random weights."""
    folder.mkdir()
    text = tokenizer.read_text(encoding="utf-8")
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    vocabulary = json.loads(text)
    size = max([*vocabulary["model"]["vocab"].values(), *(t["id"] for t in vocabulary["added_tokens"])]) + 1
    end = next((t["content"] for t in vocabulary["added_tokens"] if t["content"] in ("<|im_end|>", "</s>", "<|endoftext|>")), None)
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": end or vocabulary["added_tokens"][0]["content"]}))
    config = dict(architectures=["LlamaForCausalLM"], model_type="llama", hidden_act="silu", vocab_size=size, hidden_size=32, intermediate_size=32,
                  num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1, head_dim=32, rms_norm_eps=1e-5, max_position_embeddings=2048,
                  rope_theta=10000.0, tie_word_embeddings=True, torch_dtype="float32")
    (folder / "config.json").write_text(json.dumps(config))
    layer = "model.layers.0."
    shapes = {"model.embed_tokens.weight": [size, 32], "model.norm.weight": [32], layer + "input_layernorm.weight": [32], layer + "post_attention_layernorm.weight": [32]}
    shapes |= {f"{layer}self_attn.{name}_proj.weight": [32, 32] for name in "qkvo"} | {f"{layer}mlp.{name}_proj.weight": [32, 32] for name in ("gate", "up", "down")}
    header, at = {}, 0
    for name, shape in sorted(shapes.items()):
        bytes_ = 4 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[name] = dict(dtype="F32", shape=shape, data_offsets=[at, at + bytes_])
        at += bytes_
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    random.seed(2)
    values = array.array("f", (random.uniform(-0.05, 0.05) for _ in range(at // 4)))
    (folder / "model.safetensors").write_bytes(len(head).to_bytes(8, "little") + head + values.tobytes())


def run(command: list, env: dict) -> tuple:
    """Output, error output, seconds of the processor, peak memory in MB."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = subprocess.Popen([str(part) for part in command], stdout=out, stderr=err, env={**os.environ, **env})
        _, status, usage = os.wait4(process.pid, 0)
        out.seek(0), err.seek(0)
        texts = out.read().decode(), err.read().decode()
    if status:
        sys.exit(f"{' '.join(map(str, command))} failed:\n{texts[1][-3000:]}{texts[0][-1000:]}")
    return *texts, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def tokenizer_of(path: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    if path.suffix != ".gguf":
        return path
    # In another process: what this one has in memory counts as the peak of those it starts.
    code = "import sys; from transformers import AutoTokenizer as T; T.from_pretrained(sys.argv[1], gguf_file=sys.argv[2]).backend_tokenizer.save(sys.argv[3])"
    subprocess.run([sys.executable, "-c", code, path.parent, path.name, folder / "tokenizer.json"], check=True)
    return folder / "tokenizer.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--qlora", type=pathlib.Path, required=True)
    parser.add_argument("--tokenizer", type=pathlib.Path, help="tokenizer.json or a GGUF file; default: that of scripts/demo-model.sh")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--bar", type=float, default=0.9)
    parser.add_argument("--busy", action="store_true", help="the bar is for seconds of the processor")
    parser.add_argument("--csv", type=pathlib.Path)
    parser.add_argument("--work", type=pathlib.Path, help="a folder for rows and cache (a few GB for 1,000,000 rows)")
    args = parser.parse_args()
    root = pathlib.Path(__file__).resolve().parents[2]
    given = args.tokenizer or pathlib.Path(subprocess.run([root / "scripts/demo-model.sh"], check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    cores = len(os.sched_getaffinity(0))
    threads = dict(RAYON_NUM_THREADS=str(cores), TOKENIZERS_PARALLELISM="true", OMP_NUM_THREADS="1")
    results = []
    with tempfile.TemporaryDirectory(dir=args.work) as name:
        work = pathlib.Path(name)
        rows, model = work / "rows.jsonl", work / "model"
        write_rows(rows, args.rows)
        write_model(model, tokenizer_of(given, work))
        print(f"{args.rows} rows, {rows.stat().st_size / 1e6:.0f} MB, {cores} cores, load {os.getloadavg()[0]:.1f}", flush=True)
        for pair in range(args.pairs):
            load = os.getloadavg()[0]
            out, _, _, peak = run([sys.executable, "-c", TOKENIZE, model / "tokenizer.json", rows], threads)
            alone = json.loads(out)
            results.append(dict(pair=pair, program="tokenizers encode_batch", seconds=alone["seconds"], cpu_s=alone["cpu"], peak_mb=peak, load=load))
            train = [args.qlora, "train", model, rows, "--device", "cpu", "--r", "1", "--max-steps", "1", "--max-length", "2048", "--no-tui",
                     "--dataset-prepared-path", work / f"cache-{pair}"]
            for program in ["qlora", "qlora, from the cache"]:
                load = os.getloadavg()[0]
                _, said, cpu, peak = run([*train, "--output-dir", work / f"{program} {pair}"], threads)
                match = re.search(r"(tokenized, in|out of the cache, in) ([\d.]+) s", said)
                if not match or (match[1] == "tokenized, in") != (program == "qlora"):
                    sys.exit(f"{program}: unexpected output\n{said[-2000:]}")
                seconds = max(float(match[2]), 0.05)
                results.append(dict(pair=pair, program=program, seconds=seconds, cpu_s=cpu, peak_mb=peak, load=load))
            for result in results[-3:]:
                print("pair {pair}, {program}: {seconds:.1f} s, {rate:.0f} rows/s, {cpu_s:.1f} s of the processor, peak {peak_mb:.0f} MB (load {load:.1f})".format(rate=args.rows / result["seconds"], **result), flush=True)
    def share(key: str) -> float:
        of = lambda program: [r[key] for r in results if r["program"] == program]  # noqa: E731
        return statistics.median(theirs / ours for ours, theirs in zip(of("qlora"), of("tokenizers encode_batch")))

    print(f"ready at {share('seconds'):.0%} of encode_batch's rows/s, {share('cpu_s'):.0%} of its rows a second of the processor ({alone['tokens']} tokens)")
    if args.csv:
        with args.csv.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["rows", "tokens", "cores", "pair", "program", "seconds", "rows_per_s", "cpu_s", "peak_mb", "load"])
            for r in results:
                writer.writerow([args.rows, alone["tokens"], cores, r["pair"], r["program"], f"{r['seconds']:.2f}", f"{args.rows / r['seconds']:.0f}", f"{r['cpu_s']:.2f}", f"{r['peak_mb']:.0f}", f"{r['load']:.1f}"])
    if share("cpu_s" if args.busy else "seconds") < args.bar:
        sys.exit(f"below the bar of {args.bar:.0%}")


if __name__ == "__main__":
    main()
