#!/usr/bin/env python3
"""The licences of everything that is compiled into the command `qlora`, as one text for its archives.

    scripts/dist/licences.py TARGET [--features cuda] >THIRD-PARTY-LICENSES.txt

Takes every file with a licence's name from every crate: also those of the C libraries inside some crates (zstd, oniguruma), which tools
that go by a crate's declared licence leave out. Equal texts are printed once. Fails if a crate neither has such a file nor declares one
of the licences whose text other crates bring.
"""

import argparse
import collections
import json
import pathlib
import re
import subprocess
import sys

NAME = re.compile(r"^(licen[cs]e|copying|notice|copyright|unlicense)([-_.].*)?$", re.I)
# Nothing of these folders is compiled into a program.
ELSEWHERE = {"tests", "test", "benches", "examples", "fuzz", "doc", "docs", "node_modules", "target", "ci"}
# Texts that do not name an owner, or that every crate with its own copy brings.
KNOWN = re.compile(r"MIT|Apache-2\.0|Zlib|ISC|BSD-[23]-Clause|Unicode-3\.0|CC0-1\.0|0BSD|Unlicense|BSL-1\.0|MPL-2\.0|CDLA-Permissive-2\.0")


def crates(target, features):
    """The packages that `qlora-cli` is made of on this target, ours left out."""
    command = ["cargo", "metadata", "--format-version", "1", "--locked", "--filter-platform", target]
    command += ["--manifest-path", "crates/qlora-cli/Cargo.toml"] + (["--features", features] if features else [])
    metadata = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    packages = {package["id"]: package for package in metadata["packages"]}
    nodes = {node["id"]: node for node in metadata["resolve"]["nodes"]}
    start = next(id for id, package in packages.items() if package["name"] == "qlora-cli")
    seen, todo = {start}, [start]
    while todo:
        for dependency in nodes[todo.pop()]["deps"]:
            normal = any(kind["kind"] is None for kind in dependency["dep_kinds"])
            if normal and dependency["pkg"] not in seen:
                seen.add(dependency["pkg"])
                todo.append(dependency["pkg"])
    return sorted((packages[id] for id in seen if packages[id]["source"]), key=lambda package: (package["name"], package["version"]))


def files(package):
    folder = pathlib.Path(package["manifest_path"]).parent
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if NAME.match(path.name) and path.suffix not in (".rs", ".c", ".h", ".html") and path.is_file() and not ELSEWHERE & set(parts[:-1]):
            yield path


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target")
    parser.add_argument("--features", default="")
    args = parser.parse_args()
    texts, alone, failed = collections.defaultdict(list), [], False
    for package in crates(args.target, args.features):
        name, found = f"{package['name']} {package['version']}", list(files(package))
        for path in found:
            text = path.read_text(errors="replace").strip()
            texts[" ".join(text.split())].append((name, text))
        if not found:
            declared = package["license"] or ""
            alone.append(f"{name}: {declared}, {', '.join(package['authors']) or package['repository']}")
            if not KNOWN.search(declared):
                print(f"{name} has no licence file and declares {declared or 'none'}", file=sys.stderr)
                failed = True
    print("The command qlora is licensed under MIT or Apache-2.0. Compiled into it are these libraries, each under its own licence.\n")
    print("Without a file of their own, under the licence that they declare:\n")
    print("\n".join(alone))
    for uses in texts.values():
        print(f"\n{'=' * 100}\n{', '.join(sorted({name for name, _ in uses}))}\n{'-' * 100}\n{uses[0][1]}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
