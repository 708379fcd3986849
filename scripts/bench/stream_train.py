"""What a run takes of memory whose data are larger than the memory: `qlora train MODEL - --streaming`, rows made while they are read.

    PY scripts/bench/stream_train.py --qlora target/release/qlora --gb 20 --log benches/results/stream_train.txt

Every row is read, parsed and tokenized; 63 of 64 are longer than `max_length` and left out, so that a tiny model can train on the others
in reasonable time; so blocks of the shuffle buffer are small, and what full ones take is measured by `stream_memory.sh`. The peak of the process is compared with that of the same run over a few rows: what is over it is what the
stream takes. Fails at 256 MB. Only Linux states the peak.
"""

import argparse
import json
import os
import pathlib
import random
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from prepare_rows import write_model  # noqa: E402

LIMIT_MB = 256
WORDS = [f"w{i}" for i in range(1000)]
BATCH, SHORT = 16, 64


def tokenizer(path: pathlib.Path) -> None:
    """A word a token: the quickest there is."""
    vocabulary = {word: i for i, word in enumerate(["<unk>", "</s>", *WORDS])}
    path.write_text(json.dumps(dict(
        version="1.0", truncation=None, padding=None, normalizer=None, post_processor=None, decoder=None, pre_tokenizer={"type": "WhitespaceSplit"},
        added_tokens=[dict(id=1, content="</s>", special=True, single_word=False, lstrip=False, rstrip=False, normalized=False)],
        model=dict(type="WordLevel", vocab=vocabulary, unk_token="<unk>"))))


def rows_of(gb: float) -> tuple:
    """64 rows, how often they come, and the bytes of that."""
    random.seed(1)
    text = lambda size: " ".join(random.choices(WORDS, k=size))  # noqa: E731
    block = "".join(json.dumps({"text": text(24 if i == 0 else random.randrange(400, 2400))}) + "\n" for i in range(SHORT)).encode()
    return block, max(2 * BATCH, int(gb * 1e9 / len(block)))


def train(qlora: pathlib.Path, work: pathlib.Path, gb: float, name: str) -> dict:
    block, times = rows_of(gb)
    command = [qlora, "train", work / "model", "-", "--streaming", "--max-steps", times // BATCH, "--max-length", "128", "--on-overlong", "drop",
               "--per-device-train-batch-size", BATCH, "--gradient-accumulation-steps", 1, "--device", "cpu", "--r", "1", "--no-tui", "--save-steps", "0", "--output-dir", work / name]
    start = time.monotonic()
    with (work / f"{name}.log").open("w") as log:
        process = subprocess.Popen([str(part) for part in command], stdin=subprocess.PIPE, stdout=log, stderr=log)
        sent = 0
        try:
            for _ in range(times):
                process.stdin.write(block)
                sent += len(block)
            process.stdin.close()
        except BrokenPipeError:
            pass
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit((work / f"{name}.log").read_text()[-3000:])
    return dict(gb=sent / 1e9, rows=times * SHORT, steps=times // BATCH, seconds=time.monotonic() - start, peak_mb=usage.ru_maxrss / 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--qlora", type=pathlib.Path, required=True)
    parser.add_argument("--gb", type=float, default=20)
    parser.add_argument("--log", type=pathlib.Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        work = pathlib.Path(name)
        tokenizer(work / "tokenizer.json")
        write_model(work / "model", work / "tokenizer.json")
        few, many = train(args.qlora, work, 0, "few"), train(args.qlora, work, args.gb, "many")
    over = many["peak_mb"] - few["peak_mb"]
    line = ("{gb:.1f} GB, {rows} rows, {steps} steps in {seconds:.0f} s: peak {peak_mb:.0f} MB".format(**many)
            + f"; {few['rows']} rows alone: {few['peak_mb']:.0f} MB; over it {over:.0f} MB")
    print(line)
    if args.log:
        args.log.write_text(f"scripts/bench/stream_train.py --gb {args.gb:g}, {len(os.sched_getaffinity(0))} cores:\n\n{line}\n")
    if over >= LIMIT_MB:
        sys.exit(f"the stream takes {over:.0f} MB, the limit is {LIMIT_MB}")


if __name__ == "__main__":
    main()
