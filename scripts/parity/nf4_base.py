"""A base in bitsandbytes' NF4 with double quantization, and the correction of its CPU backend's codes."""

import numpy as np
import torch
from bitsandbytes.nn import Linear4bit
from transformers import AutoModelForCausalLM, BitsAndBytesConfig


def set_codes_to_nearest(weight, plain: np.ndarray) -> int:
    """Replaces the absmax codes that are not the level nearest to (absmax - offset) / nested absmax; how many?"""
    state = weight.quant_state
    levels, offset = state.state2.code.numpy(), state.offset.numpy()
    absmax = np.abs(plain.reshape(-1, 64)).max(axis=1) - offset
    nested = np.repeat(state.state2.absmax.numpy(), 256)[: len(absmax)]
    scaled = absmax * (np.float32(1) / nested)
    middle = (levels[:-1].astype(np.float64) + levels[1:].astype(np.float64)) / 2
    codes = torch.from_numpy(np.searchsorted(middle, scaled.astype(np.float64)).astype(np.uint8))
    changed = int((codes != state.absmax).sum())
    state.absmax.copy_(codes)
    return changed


def load(source: str, base: str):
    """`base`: `f32` (plain), `nf4` (as bitsandbytes quantizes on the CPU) or `nf4_nearest` (corrected). f32 compute."""
    kwargs = {}
    if base != "f32":
        kwargs["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, attn_implementation="eager", **kwargs)
    if base == "nf4_nearest":
        plain = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        changed = total = 0
        for name, module in model.named_modules():
            if isinstance(module, Linear4bit):
                changed += set_codes_to_nearest(module.weight, plain.get_submodule(name).weight.detach().numpy())
                total += module.weight.quant_state.absmax.numel()
        print(f"{changed} of {total} absmax codes were not the nearest level")
    return model
