#!/usr/bin/env python3
"""What CUDA code a program holds: the architectures of its compiled code, and the PTX version of every module in it.

    scripts/cuda-modules.py PROGRAM [--expect 75,80,86,89,90,100,120] [--driver 580]
    scripts/cuda-modules.py --self-test

A driver translates PTX up to the version that it came with, and no newer one: the newest module here decides which driver the program
needs. Modules are fatbins (found by their magic number, whatever section they are in): ours, with PTX of the newest architecture, and
candle's static ones, without; and PTX stored as text: the rest of candle's kernels. --expect fails if a module of ours lacks compiled
code for one of these architectures, or there is none; --driver fails if a driver of that branch would refuse a module.
"""

import argparse
import collections
import re
import struct
import sys

# The layout of a fatbin, as nvcc 11.8 and 13.0 write it: a header, then entries with a header of their own.
MAGIC = 0xBA55ED50
HEADER = struct.Struct("<IHHQ")  # magic, version, bytes of this header, bytes of all entries
ENTRY = struct.Struct("<HHIQIIHHI")  # kind, -, bytes of this header, bytes of the data, compressed, -, minor, major, architecture
PTX, ELF = 1, 2

# The branch of Linux drivers that first took a version of PTX (CUDA Toolkit Release Notes; PTX ISA, "Release History").
DRIVERS = {
    (7, 8): 520, (8, 0): 525, (8, 1): 530, (8, 2): 535, (8, 3): 545, (8, 4): 550, (8, 5): 555, (8, 6): 560, (8, 7): 570,
    (8, 8): 575, (9, 0): 580,
}

TEXT = re.compile(rb"\.version\s+(\d+)\.(\d+)\s+\.target\s+sm_(\d+)")

Module = collections.namedtuple("Module", "place compiled ptx")


def fatbins(data):
    """Yields the modules that are fatbins."""
    at = data.find(struct.pack("<I", MAGIC))
    while at >= 0:
        _, version, header, size = HEADER.unpack_from(data, at) if at + HEADER.size <= len(data) else (0, 0, 0, 0)
        end = at + header + size
        if version == 1 and header == HEADER.size and 0 < size and end <= len(data):
            compiled, ptx, entry = set(), {}, at + header
            while entry + ENTRY.size <= end:
                kind, _, bytes_of_header, bytes_of_data, _, _, minor, major, arch = ENTRY.unpack_from(data, entry)
                if kind not in (PTX, ELF) or bytes_of_header < ENTRY.size:
                    raise ValueError(f"byte {entry}: an entry of a fatbin that this script does not know")
                if kind == PTX:
                    ptx[arch] = (major, minor)
                else:
                    compiled.add(arch)
                entry += bytes_of_header + bytes_of_data
            yield Module(f"fatbin at byte {at}", compiled, ptx)
            at = end - 1
        at = data.find(struct.pack("<I", MAGIC), at + 1)


def texts(data):
    """Yields the modules that are PTX as text."""
    for found in TEXT.finditer(data):
        major, minor, arch = (int(group) for group in found.groups())
        yield Module(f"PTX text at byte {found.start()}", set(), {arch: (major, minor)})


def is_ours(module):
    """build.rs adds the PTX of the newest architecture; candle's build adds none to compiled code."""
    return bool(module.compiled and module.ptx)


def problems(modules, expect, driver):
    """What is missing or too new, in words."""
    if expect and not any(is_ours(module) for module in modules):
        yield "no module of ours"
    for module in modules:
        place, compiled, ptx = module
        missing = sorted(set(expect) - compiled) if is_ours(module) else []
        if missing:
            yield f"{place}: no compiled code for {', '.join(f'sm_{arch}' for arch in missing)}"
        for version in ptx.values() if driver else ():
            needed = DRIVERS.get(version)
            if needed is None or needed > driver:
                yield f"{place}: PTX {version[0]}.{version[1]} needs driver {needed or 'unknown'}, not {driver}"


def report(modules):
    kinds = collections.Counter()
    for module in modules:
        compiled = " ".join(f"sm_{arch}" for arch in sorted(module.compiled)) or "-"
        ptx = " ".join(f"{a}.{b} for compute_{arch}" for arch, (a, b) in sorted(module.ptx.items())) or "-"
        kinds["fatbin" if module.place.startswith("fatbin") else "text", compiled, ptx] += 1
    print(f"{'modules':>7}  {'stored as':9}  {'compiled for':44}  PTX")
    for (kind, compiled, ptx), count in sorted(kinds.items()):
        print(f"{count:>7}  {kind:9}  {compiled:44}  {ptx}")
    newest = max((version for module in modules for version in module.ptx.values()), default=None)
    if newest:
        print(f"newest PTX {newest[0]}.{newest[1]}: needs driver {DRIVERS.get(newest, 'unknown')} or newer")


def self_test():
    def entry(kind, arch, version, data):
        head = ENTRY.pack(kind, 0x101, 64, len(data), 0, 0, version[1], version[0], arch)
        return head.ljust(64, b"\0") + data

    def fatbin(*entries):
        return HEADER.pack(MAGIC, 1, 16, sum(map(len, entries))) + b"".join(entries)

    ours = fatbin(entry(ELF, 80, (1, 7), b"x" * 40), entry(ELF, 90, (1, 8), b"y"), entry(PTX, 90, (9, 0), b"z" * 8))
    text = b"//\n.version 7.8\n.target sm_75\n.address_size 64\n"
    data = b"noise" + struct.pack("<I", MAGIC) + b"more" + ours + b"\0" * 3 + text
    modules = [*fatbins(data), *texts(data)]
    assert [module[1:] for module in modules] == [({80, 90}, {90: (9, 0)}), (set(), {75: (7, 8)})], modules
    assert not list(problems(modules, [80, 90], 580))
    assert "no compiled code for sm_75" in next(problems(modules, [75, 80], None))
    candles = [*fatbins(fatbin(entry(ELF, 75, (1, 7), b"x")))]
    assert not list(problems(modules + candles, [80, 90], 580)) and list(problems(candles, [80], None)) == ["no module of ours"]
    assert "PTX 9.0 needs driver 580, not 550" in next(problems(modules, [], 550))
    unknown = fatbin(entry(PTX, 75, (19, 0), b""))
    assert "driver unknown" in next(problems(list(fatbins(unknown)), [], 999))
    try:
        list(fatbins(fatbin(entry(7, 75, (1, 0), b""))))
        raise SystemExit("an unknown entry was read")
    except ValueError:
        print("self-test passed")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", nargs="?")
    parser.add_argument("--expect", default="", help="architectures, separated by commas")
    parser.add_argument("--driver", type=int, help="branch of a driver, such as 580")
    parser.add_argument("--self-test", action="store_true")
    args = parser.parse_args()
    if args.self_test:
        return self_test()
    if not args.program:
        parser.error("which program?")
    with open(args.program, "rb") as file:
        data = file.read()
    modules = [*fatbins(data), *texts(data)]
    if not modules:
        sys.exit(f"{args.program}: no CUDA code")
    report(modules)
    found = list(problems(modules, [int(arch) for arch in args.expect.split(",") if arch], args.driver))
    for problem in found:
        print(problem, file=sys.stderr)
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
