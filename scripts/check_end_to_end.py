#!/usr/bin/env python3
"""Does PEFT read an adapter that this library wrote, and compute the same with it?

    python check_end_to_end.py BASE_FOLDER ADAPTER_FOLDER [--generated FILE.json] [--logits FILE.safetensors]
                               [--base f32|nf4|nf4_nearest] [--atol 1e-3]

BASE_FOLDER is a Hugging Face folder, ADAPTER_FOLDER holds `adapter_config.json` and `adapter_model.safetensors`.
Checks, each with a line of output; the exit code is 1 if one fails:
1. the file's keys are exactly those PEFT expects: none missing, none unexpected, and no adapter tensor was left as
   PEFT initialized it;
2. `--logits`: for i = 0, 1, ...: `input_ids.i` (I64 or U32, [n]) and `logits.i` (F32, [n, vocab], the adapter on).
   The largest difference to PEFT's must be at most `--atol`. `base_logits.i`, if there, is compared with the adapter
   off;
3. `--generated`: `[{"input_ids": [...], "new_ids": [...]}, ...]`: greedy generation with the adapter on must give the
   same tokens. A difference is shown with the distance between the two largest logits at that place: if that is of
   the size of f32 rounding, the two answers are equally right, and the prompt a bad choice.

With `--base nf4_nearest` the base is quantized as the adapter's training had it (NF4, double quantization, blocksize
64) and every block maximum has the code of the nearest level. With `--base nf4` the codes are those of bitsandbytes'
CPU backend, about 2 in 1000 of which are not the nearest: allow a larger `--atol` then.
"""

import argparse
import json
import pathlib
import sys
import warnings

import torch
from peft import PeftModel
from safetensors import safe_open

sys.path.append(str(pathlib.Path(__file__).resolve().parent / "parity"))
import nf4_base  # noqa: E402

failures = 0


def report(ok: bool, text: str) -> None:
    global failures
    failures += not ok
    print(f"{'ok  ' if ok else 'FAIL'} {text}")


def load(args):
    base = nf4_base.load(args.base_folder, args.base)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(base, args.adapter)
        # A second time under another name, for the list of keys that the first way only warns about.
        result = model.load_adapter(args.adapter, "again")
    keys = [str(w.message) for w in caught if "key" in str(w.message).lower()]
    report(not keys, f"PEFT loads the adapter without a warning about keys {keys or ''}")
    missing = [key for key in result.missing_keys if ".again." in key or ".lora_" in key]
    report(not missing, f"missing keys: {missing[:4] or 'none'}")
    report(not result.unexpected_keys, f"unexpected keys: {result.unexpected_keys[:4] or 'none'}")
    model.delete_adapter("again")
    model.set_adapter("default")
    return model.train()  # without dropout the same as eval; in eval mode bitsandbytes on some CPUs computes in bf16


def check_tensors(model, folder: str) -> None:
    with safe_open(f"{folder}/adapter_model.safetensors", "pt") as file:
        stored = {key: file.get_tensor(key) for key in file.keys()}
    loaded = {n.replace(".default", ""): p for n, p in model.named_parameters() if "lora_" in n}
    same = stored.keys() == loaded.keys() and all(torch.equal(stored[k].float(), loaded[k].float()) for k in stored)
    report(same, f"{len(stored)} adapter tensors are in the model as they are in the file")
    zero = [key for key, value in stored.items() if not value.any()]
    report(not zero, f"tensors that are zero: {zero[:4] or 'none'}")


@torch.no_grad()
def check_logits(model, path: str, atol: float) -> None:
    with safe_open(path, "pt") as file:
        keys = set(file.keys())
        count = sum(key.startswith("input_ids.") for key in keys)
        report(count > 0, f"{path} holds {count} sequences")
        for i in range(count):
            ids = file.get_tensor(f"input_ids.{i}").long()[None]
            for prefix in ("logits", "base_logits"):
                if f"{prefix}.{i}" not in keys:
                    continue
                ours = file.get_tensor(f"{prefix}.{i}")
                if prefix == "logits":
                    theirs = model(input_ids=ids, use_cache=False).logits[0]
                else:
                    with model.disable_adapter():
                        theirs = model(input_ids=ids, use_cache=False).logits[0]
                if ours.shape != theirs.shape:
                    report(False, f"{prefix}.{i}: ours {tuple(ours.shape)}, PEFT's {tuple(theirs.shape)}")
                    continue
                difference = (ours - theirs).abs().max().item()
                # `not >` so that a NaN fails.
                text = f"{prefix}.{i}: {ids.shape[1]} tokens, largest difference {difference:.2e} (at most {atol:.0e})"
                report(difference <= atol, text)


@torch.no_grad()
def check_generated(model, path: str) -> None:
    with open(path, encoding="utf-8") as file:
        rows = json.load(file)
    report(len(rows) > 0, f"{path} holds {len(rows)} prompts")
    equal = 0
    for number, row in enumerate(rows):
        # Greedy generation gives our tokens if and only if each has the largest logit given those before.
        ids = torch.tensor([row["input_ids"] + row["new_ids"]])
        logits = model(input_ids=ids, use_cache=False).logits[0, len(row["input_ids"]) - 1 : -1]
        wrong = (logits.argmax(-1) != torch.tensor(row["new_ids"])).nonzero()
        if len(wrong):
            at = wrong[0].item()
            first, second = logits[at].topk(2).values.tolist()
            token = logits[at].argmax().item()
            report(
                False,
                f"prompt {number}, token {at}: ours {row['new_ids'][at]}, PEFT's {token}, margin {first - second:.1e}",
            )
        else:
            equal += len(row["new_ids"]) > 0
    report(equal == len(rows), f"{equal} of {len(rows)} greedy generations are equal")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base_folder")
    parser.add_argument("adapter")
    parser.add_argument("--generated")
    parser.add_argument("--logits")
    parser.add_argument("--base", choices=["f32", "nf4", "nf4_nearest"], default="f32")
    parser.add_argument("--atol", type=float, default=1e-3)
    args = parser.parse_args()
    model = load(args)
    check_tensors(model, args.adapter)
    if args.logits:
        check_logits(model, args.logits, args.atol)
    if args.generated:
        check_generated(model, args.generated)
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
