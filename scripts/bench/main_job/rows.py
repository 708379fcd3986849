#!/usr/bin/env python3
"""The rows of the main job and the tokenizer they are written for. Python's standard library only.

    python3 rows.py FOLDER [--rows 600] [--seed 321]     # FOLDER/rows.jsonl, FOLDER/prompts.jsonl
    python3 rows.py --tokenizer MODEL [--vocab 128256]                 # tokenizer.json, tokenizer_config.json in MODEL

A row is {"prompt": ..., "completion": ...}: a prompt of 20 to 700 random words of a toy vocabulary of 2,000, a completion
of 5 to 300. The tokenizer makes one token of a word and adds none at the beginning; a trainer appends the end token to a
completion, so a row has as many tokens as words and one more: 305,700 in 600 rows of seed 321. The same seed gives the
same bytes on every version of Python: the numbers come from a generator that is written out here.

`prompts.jsonl` has 256 prompts of 20 to 100 words, for generation.

The tokenizer has a word for every id of a Llama-3.1-shaped model (so that whatever a model with random weights says is
text), and Llama's end, padding and begin tokens.
"""

import argparse
import json
import pathlib

TOY = 2000
SEED = 321
BEGIN, END, PAD = "<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>"
UNKNOWN = "<|reserved_special_token_0|>"


class Numbers:
    """SplitMix64."""

    def __init__(self, seed: int):
        self.state = seed

    def next(self) -> int:
        mask = (1 << 64) - 1
        self.state = (self.state + 0x9E3779B97F4A7C15) & mask
        z = self.state
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & mask
        return z ^ (z >> 31)

    def between(self, low: int, high: int) -> int:
        """Both included. The bias of the remainder is below 1e-15."""
        return low + self.next() % (high - low + 1)


def word(index: int) -> str:
    """The word of an id: syllables, at least two."""
    consonants, vowels = "bdfghjklmnprstvz", "aeiou"
    syllables = []
    while index or len(syllables) < 2:
        index, syllable = divmod(index, len(consonants) * len(vowels))
        syllables.append(consonants[syllable // len(vowels)] + vowels[syllable % len(vowels)])
    return "".join(reversed(syllables))


def text(numbers: Numbers, words: int) -> str:
    return " ".join(word(numbers.between(0, TOY - 1)) for _ in range(words))


def make_rows(count: int, seed: int) -> list[dict]:
    numbers = Numbers(seed)
    rows = []
    for _ in range(count):
        prompt, completion = numbers.between(20, 700), numbers.between(5, 300)
        rows.append({"prompt": text(numbers, prompt), "completion": " " + text(numbers, completion)})
    return rows


def tokens(row: dict) -> int:
    """Of a row with its end token."""
    return len(row["prompt"].split()) + len(row["completion"].split()) + 1


def write_lines(path: pathlib.Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_rows(folder: pathlib.Path, count: int = 600, seed: int = SEED) -> list[dict]:
    rows = make_rows(count, seed)
    write_lines(folder / "rows.jsonl", rows)
    numbers = Numbers(seed + 1)
    write_lines(folder / "prompts.jsonl", [{"prompt": text(numbers, numbers.between(20, 100))} for _ in range(256)])
    return rows


def write_tokenizer(folder: pathlib.Path, vocab: int = 128256) -> None:
    special = {BEGIN: vocab - 256, END: vocab - 255, UNKNOWN: vocab - 254, PAD: vocab - 252}
    taken = set(special.values())
    vocabulary = {word(index): index for index in range(vocab) if index not in taken} | special
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": index, "content": name} | flags for name, index in sorted(special.items())],
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": UNKNOWN},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    names = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN,
        "eos_token": END,
        "pad_token": PAD,
        "unk_token": UNKNOWN,
        "model_max_length": 131072,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(names, indent=2), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=pathlib.Path, nargs="?")
    parser.add_argument("--rows", type=int, default=600)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--tokenizer", type=pathlib.Path, metavar="MODEL", help="write the tokenizer into this folder")
    parser.add_argument("--vocab", type=int, default=128256)
    args = parser.parse_args()
    if not args.folder and not args.tokenizer:
        parser.error("say where the rows go, or --tokenizer MODEL")
    if args.tokenizer:
        write_tokenizer(args.tokenizer, args.vocab)
    if args.folder:
        rows = write_rows(args.folder, args.rows, args.seed)
        print(f"{len(rows)} rows, {sum(map(tokens, rows)):,} tokens in {args.folder / 'rows.jsonl'}")


if __name__ == "__main__":
    main()
