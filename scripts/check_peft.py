#!/usr/bin/env python3
"""Loads an adapter folder with PEFT and checks that it is taken whole, and that its logits are those given.

    scripts/check_peft.py --base FOLDER_OR_ID --adapter FOLDER [--gguf-file NAME] [--logits FILE] [--tolerance 1e-3]

Passes (exit code 0) if PEFT warns about nothing, misses no tensor, finds none that it does not expect, and holds exactly the
numbers of the file. --logits is a safetensors file with `input_ids` (integers, [tokens]) and `logits` (f32, [tokens, vocab])
of the base with the adapter; the largest difference has to stay within the tolerance. Without it the first logits are printed.

Needs torch, transformers, peft, safetensors (made with peft 0.21.2, transformers 5.23.0); gguf for --gguf-file.
"""

import argparse
import sys
import warnings

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


def fail(message):
    print(f"FAILED: {message}")
    sys.exit(1)


def check_tensors(model, adapter):
    """PEFT's tensors of the loaded adapter against those of the file."""
    file = load_file(f"{adapter}/adapter_model.safetensors")
    embeddings = any(name.endswith("base_layer.weight") for name in file)
    held = get_peft_model_state_dict(model, save_embedding_layers=embeddings)
    if missing := sorted(held.keys() - file.keys()):
        fail(f"missing keys: {missing}")
    if unexpected := sorted(file.keys() - held.keys()):
        fail(f"unexpected keys: {unexpected}")
    for name, tensor in file.items():
        if tensor.shape != held[name].shape:
            fail(f"{name}: {tuple(tensor.shape)} in the file, {tuple(held[name].shape)} in the model")
        if not torch.equal(tensor.float(), held[name].float()):
            fail(f"{name}: PEFT does not hold the numbers of the file")
    dtypes = {str(tensor.dtype) for tensor in file.values()}
    print(f"{len(file)} tensors, {sum(tensor.numel() for tensor in file.values())} numbers, {', '.join(sorted(dtypes))}: all taken")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True)
    parser.add_argument("--adapter", required=True)
    parser.add_argument("--gguf-file")
    parser.add_argument("--logits")
    parser.add_argument("--tolerance", type=float, default=1e-3)
    arguments = parser.parse_args()
    torch.set_num_threads(2)

    extra = {"gguf_file": arguments.gguf_file} if arguments.gguf_file else {}
    base = AutoModelForCausalLM.from_pretrained(arguments.base, dtype=torch.float32, **extra)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        config = PeftConfig.from_pretrained(arguments.adapter)
        model = PeftModel.from_pretrained(base, arguments.adapter, config=config).eval()
    own = (DeprecationWarning, FutureWarning)  # of the libraries among themselves
    messages = [str(warning.message) for warning in caught if not issubclass(warning.category, own)]
    # Advice about a later merging of such a kind of adapter, whoever wrote it.
    messages = [message for message in messages if "merging" not in message]
    if messages:
        fail("PEFT warned: " + "; ".join(messages))
    check_tensors(model, arguments.adapter)

    if arguments.logits is None:
        with torch.no_grad():
            logits = model(torch.arange(1, 9)[None]).logits[0]
        print("logits of tokens 1 to 8, first four of each:")
        print(logits[:, :4])
        return
    given = load_file(arguments.logits)
    with torch.no_grad():
        logits = model(given["input_ids"].long().reshape(1, -1)).logits[0]
    if logits.shape != given["logits"].shape:
        fail(f"logits {tuple(given['logits'].shape)} given, {tuple(logits.shape)} expected")
    difference = (logits - given["logits"].float()).abs().max().item()
    print(f"largest difference of {logits.numel()} logits: {difference:.3e} (largest logit {logits.abs().max().item():.2f})")
    if not difference <= arguments.tolerance:
        fail(f"above the tolerance {arguments.tolerance}")


if __name__ == "__main__":
    main()
