#!/usr/bin/env python3
"""Which shared libraries and symbol versions a Linux program needs, read from the file itself.

    scripts/dist/elf_needs.py PROGRAM [--glibc 2.28] [--allow libcublas.so.13 ...]
    scripts/dist/elf_needs.py --self-test

--glibc fails if a symbol of a newer glibc is needed; --allow fails if a library is needed that is neither listed nor part of every
system (glibc itself, and gcc's support libraries). Prints the libraries, the newest version of each family of symbols, and the tag
of Python wheels (manylinux, PEP 600) that follows.
"""

import argparse
import re
import struct
import sys

# 64 bits, little-endian: all we build for.
HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
SEGMENT = struct.Struct("<IIQQQQQQ")  # type, flags, offset, address, -, bytes in the file, -, -
DYNAMIC = struct.Struct("<qQ")
NEED = struct.Struct("<HHIII")  # version, count, file, first entry, next
ENTRY = struct.Struct("<IHHII")  # hash, flags, index, name, next
LOAD, DYNAMIC_SEGMENT = 1, 2
NEEDED, STRINGS, VERSIONS, VERSIONS_COUNT = 1, 5, 0x6FFFFFFE, 0x6FFFFFFF
MACHINES = {62: "x86_64", 183: "aarch64"}

# What every Linux system with glibc has, and what PEP 600 lets wheels rely on.
EVERYWHERE = {
    "libc.so.6", "libm.so.6", "libdl.so.2", "libpthread.so.0", "librt.so.1", "libutil.so.1", "libgcc_s.so.1", "libstdc++.so.6",
    "ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1",
}

# The newest symbols of gcc's C++ library in the distributions that a wheel's tag stands for (auditwheel's policies), by their glibc.
CXX = [((2, 17), (3, 4, 19)), ((2, 28), (3, 4, 24)), ((2, 31), (3, 4, 28)), ((2, 34), (3, 4, 29)), ((2, 35), (3, 4, 30)),
       ((2, 39), (3, 4, 33))]


class Elf:
    """The needs of a program: `libraries`, and `versions` as names of symbols' versions by library."""

    def __init__(self, data):
        if len(data) < HEADER.size or data[:6] != b"\x7fELF\x02\x01":
            raise ValueError("no 64-bit little-endian ELF file")
        _, _, machine, _, _, segments, _, _, _, size, count, _, _, _ = HEADER.unpack_from(data)
        self.machine = MACHINES.get(machine, f"machine {machine}")
        self.libraries, self.versions = [], {}
        table = [SEGMENT.unpack_from(data, segments + size * index) for index in range(count)]
        dynamic = [entry for entry in table if entry[0] == DYNAMIC_SEGMENT]
        if not dynamic:
            return  # linked statically

        def place(address):
            for kind, _, offset, start, _, length, _, _ in table:
                if kind == LOAD and start <= address < start + length:
                    return address - start + offset
            raise ValueError(f"address {address:#x} is in no segment")

        entries = []
        offset, length = dynamic[0][2], dynamic[0][5]
        for at in range(offset, offset + length, DYNAMIC.size):
            entries.append(DYNAMIC.unpack_from(data, at))
        of = dict(entries)
        strings = place(of[STRINGS])

        def text(index):
            start = strings + index
            return data[start : data.index(b"\0", start)].decode()

        self.libraries = [text(value) for tag, value in entries if tag == NEEDED]
        at = place(of[VERSIONS]) if VERSIONS in of else 0
        for _ in range(of.get(VERSIONS_COUNT, 0)):
            _, count, file, entry, step = NEED.unpack_from(data, at)
            entry += at
            for _ in range(count):
                _, _, _, name, next_entry = ENTRY.unpack_from(data, entry)
                self.versions.setdefault(text(file), []).append(text(name))
                entry += next_entry
            at += step

    def newest(self, family):
        """The newest version of a family of symbols (GLIBC, GLIBCXX), as numbers; none if there is none."""
        names = (name for names in self.versions.values() for name in names)
        found = [re.fullmatch(family + r"_([\d.]+)", name) for name in names]
        return max((tuple(map(int, match[1].split("."))) for match in found if match), default=None)

    def wheel_tag(self):
        """manylinux_2_28_x86_64: the oldest glibc whose systems have every symbol that is needed."""
        glibc = max(self.newest("GLIBC") or (2, 17), (2, 17))[:2]
        cxx = self.newest("GLIBCXX")
        if cxx:
            glibc = max(glibc, next((known for known, newest in CXX if newest >= cxx), (2, 999)))
        return f"manylinux_{glibc[0]}_{glibc[1]}_{self.machine}"


def problems(elf, glibc, allowed):
    """What is needed and must not be, in words."""
    for library, names in elf.versions.items():
        for name in names:
            match = re.fullmatch(r"GLIBC_(\d+)\.(\d+)[\d.]*", name)
            if glibc and match and (int(match[1]), int(match[2])) > glibc:
                yield f"{name} of {library} is newer than glibc {glibc[0]}.{glibc[1]}"
            if glibc and name == "GLIBC_ABI_DT_RELR":
                yield f"{name}: relocations that glibc before 2.36 does not read"
    for library in elf.libraries if allowed is not None else ():
        if library not in EVERYWHERE and library not in allowed:
            yield f"{library} is not on every system, and not one that is expected"


def self_test():
    def program(libraries, versions):
        """A file with these needs: one segment from address 0x1000 on, the strings, the versions, the dynamic section."""
        strings, places = b"\0", {}

        def add(name):
            nonlocal strings
            if name not in places:
                places[name] = len(strings)
                strings += name.encode() + b"\0"
            return places[name]

        needs = b""
        for number, (file, names) in enumerate(versions.items()):
            last = number + 1 == len(versions)
            needs += NEED.pack(1, len(names), add(file), NEED.size, 0 if last else NEED.size + ENTRY.size * len(names))
            for index, name in enumerate(names):
                needs += ENTRY.pack(0, 0, 2, add(name), 0 if index + 1 == len(names) else ENTRY.size)
        needed = [(NEEDED, add(name)) for name in libraries]
        start = HEADER.size + 2 * SEGMENT.size
        base = 0x1000
        tags = needed + [(STRINGS, base + start), (VERSIONS, base + start + len(strings)), (VERSIONS_COUNT, len(versions)), (0, 0)]
        dynamic = b"".join(DYNAMIC.pack(*tag) for tag in tags)
        end = start + len(strings) + len(needs)
        head = HEADER.pack(b"\x7fELF\x02\x01".ljust(16, b"\0"), 3, 62, 1, 0, HEADER.size, 0, 0, 64, SEGMENT.size, 2, 0, 0, 0)
        head += SEGMENT.pack(LOAD, 4, 0, base, base, end, end, 1)
        head += SEGMENT.pack(DYNAMIC_SEGMENT, 4, end, base + end, 0, len(dynamic), len(dynamic), 8)
        return head + strings + needs + dynamic

    elf = Elf(program(["libc.so.6", "libm.so.6"], {"libc.so.6": ["GLIBC_2.9", "GLIBC_2.28"], "libm.so.6": ["GLIBC_2.2.5"]}))
    assert elf.libraries == ["libc.so.6", "libm.so.6"] and elf.newest("GLIBC") == (2, 28), vars(elf)
    assert elf.wheel_tag() == "manylinux_2_28_x86_64" and not list(problems(elf, (2, 28), []))
    assert "GLIBC_2.28 of libc.so.6 is newer than glibc 2.27" in list(problems(elf, (2, 27), []))
    elf = Elf(program(["libcublas.so.13", "libc.so.6"], {"libc.so.6": ["GLIBC_2.17", "GLIBC_ABI_DT_RELR"]}))
    assert any("libcublas.so.13" in problem for problem in problems(elf, None, []))
    assert not list(problems(elf, None, ["libcublas.so.13"]))
    assert any("DT_RELR" in problem for problem in problems(elf, (2, 28), None))
    elf = Elf(program(["libstdc++.so.6"], {"libstdc++.so.6": ["GLIBCXX_3.4.30"], "libc.so.6": ["GLIBC_2.28"]}))
    assert elf.wheel_tag() == "manylinux_2_35_x86_64", elf.wheel_tag()
    try:
        Elf(b"#!/bin/sh\n".ljust(80))
        raise SystemExit("a script was read as a program")
    except ValueError:
        print("elf_needs: the self-test passed")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", nargs="?")
    parser.add_argument("--glibc", help="the oldest glibc it is to run with")
    parser.add_argument("--allow", nargs="*", help="libraries that may be needed beside the system's")
    parser.add_argument("--wheel-tag", action="store_true", help="prints the wheel's tag alone")
    parser.add_argument("--self-test", action="store_true")
    args = parser.parse_args()
    if args.self_test:
        return self_test()
    if not args.program:
        parser.error("which program?")
    with open(args.program, "rb") as file:
        elf = Elf(file.read())
    if args.wheel_tag:
        return print(elf.wheel_tag())
    print(f"{args.program}: {elf.machine}, needs {', '.join(elf.libraries) or 'no library'}")
    for family in ("GLIBC", "GLIBCXX", "CXXABI", "GCC"):
        newest = elf.newest(family)
        if newest:
            print(f"  newest {family} symbol: {'.'.join(map(str, newest))}")
    print(f"  wheels: {elf.wheel_tag()}")
    glibc = tuple(map(int, args.glibc.split("."))) if args.glibc else None
    found = list(problems(elf, glibc, args.allow))
    for problem in found:
        print(f"{args.program}: {problem}", file=sys.stderr)
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
