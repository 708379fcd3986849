#!/usr/bin/env python3
"""Compares a quantized GGUF file of ours with ggml's own quantizer, tensor by tensor.

    qlora export MODEL --type f32 --out base.gguf
    qlora export MODEL --type q4_k_m --out ours.gguf
    scripts/check_k_quants.py base.gguf ours.gguf GGML/libggml/lib64/libggml-base.so [--write theirs.gguf]

Passes (exit code 0) if no tensor, read by the gguf package, has a larger squared error than ggml_quantize_chunk leaves for the same
tensor and type. --write also makes the file that ggml's blocks would give, to compare what the two models answer.

Needs gguf 0.19.0, numpy, and libggml-python 0.20.2.post1 for the library.
"""

import argparse
import ctypes
import shutil
import sys

import gguf
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType as Type

PLAIN = (Type.F32, Type.F16, Type.BF16)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("ours")
    parser.add_argument("library")
    parser.add_argument("--write")
    arguments = parser.parse_args()
    ggml = ctypes.CDLL(arguments.library)
    ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
    ggml.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p,
    ]
    if arguments.write:
        shutil.copy(arguments.ours, arguments.write)
    base = {tensor.name: tensor for tensor in gguf.GGUFReader(arguments.base).tensors}
    reader = gguf.GGUFReader(arguments.write or arguments.ours, "r+" if arguments.write else "r")
    totals, worse = {}, []
    for tensor in reader.tensors:
        kind = tensor.tensor_type
        if kind in PLAIN:
            continue
        source = base[tensor.name]
        values = np.ascontiguousarray(gguf.quants.dequantize(source.data, source.tensor_type), np.float32)
        block, size = GGML_QUANT_SIZES[kind]
        made = np.zeros((values.shape[0], values.shape[1] // block * size), np.uint8)
        written = ggml.ggml_quantize_chunk(int(kind), values.ctypes.data, made.ctypes.data, 0, *values.shape, None)
        assert written == made.size, (tensor.name, written, made.size)
        ours, theirs = (
            float(((gguf.quants.dequantize(data, kind) - values) ** 2).sum(dtype=np.float64)) for data in (tensor.data, made)
        )
        if ours > theirs:
            worse.append(f"{tensor.name} ({kind.name}): {ours:e}, ggml {theirs:e}")
        total = totals.setdefault(kind.name, [0, 0.0, 0.0])
        total[0], total[1], total[2] = total[0] + 1, total[1] + ours, total[2] + theirs
        if arguments.write:
            tensor.data[...] = made.reshape(tensor.data.shape)
    for name, (count, ours, theirs) in totals.items():
        part = f"{ours / theirs:.4f}" if theirs else "exact"
        print(f"{name}: {count} tensors, squared error {ours:.4e}, ggml {theirs:.4e}, {part}")
    for line in worse:
        print(f"FAILED: {line}")
    sys.exit(bool(worse or not totals))


if __name__ == "__main__":
    main()
