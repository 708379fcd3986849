#!/usr/bin/env python3
"""Makes a wheel that carries programs, for `pip install`.

    scripts/dist/wheel.py NAME --version 0.1.0 --tag manylinux_2_28_x86_64 --out DIR --summary TEXT
        --file PROGRAM=scripts/qlora ... [--requires REQUIREMENT ...] [--extra NAME ...]

A file goes where pip puts that kind: `scripts/` is an environment's `bin/`, `data/` its root. The package `wheel`, which must be
installed, writes the record and the archive. maturin, which makes wheels of Rust programs, is not used: it builds the one program
that it packs, and these hold programs that were built otherwise, one of them outside `bin/`.
"""

import argparse
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[2]


def python_version(version):
    """PEP 440's form of a version of Cargo's: 0.2.0-rc.1 is 0.2.0rc1."""
    match = re.fullmatch(r"(\d+\.\d+\.\d+)(?:-(alpha|beta|rc)\.?(\d+))?", version)
    if not match:
        sys.exit(f"wheel: no form of {version} for Python is known")
    release, kind, number = match.groups()
    return release + ({"alpha": "a", "beta": "b", "rc": "rc"}[kind] + number if kind else "")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("--version", required=True)
    parser.add_argument("--tag", required=True)
    parser.add_argument("--out", required=True, type=pathlib.Path)
    parser.add_argument("--summary", required=True)
    parser.add_argument("--file", action="append", required=True, metavar="PATH=KIND/NAME")
    parser.add_argument("--licence", action="append", default=[], type=pathlib.Path)
    parser.add_argument("--requires", action="append", default=[])
    parser.add_argument("--extra", action="append", default=[])
    args = parser.parse_args()
    version = python_version(args.version)
    distribution = f"{args.name.replace('-', '_')}-{version}"
    licences = [ROOT / "LICENSE-MIT", ROOT / "LICENSE-APACHE", *args.licence]
    with tempfile.TemporaryDirectory() as folder:
        top = pathlib.Path(folder)
        for pair in args.file:
            path, _, place = pair.partition("=")
            to = top / f"{distribution}.data" / place
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, to)
            to.chmod(0o755)
        info = top / f"{distribution}.dist-info"
        (info / "licenses").mkdir(parents=True)
        for licence in licences:
            shutil.copyfile(licence, info / "licenses" / licence.name)
        head = ["Metadata-Version: 2.4", f"Name: {args.name}", f"Version: {version}", f"Summary: {args.summary}"]
        head += ["License-Expression: MIT OR Apache-2.0", *(f"License-File: {licence.name}" for licence in licences)]
        head += ["Keywords: qlora,lora,llm,fine-tuning,rust", "Project-URL: Source, https://github.com/qlora-rs/qlora"]
        # NVIDIA's packages need 3.5; pip that knows tags like manylinux_2_28 needs 3.6.
        head += ["Requires-Python: >=3.6", *(f"Provides-Extra: {extra}" for extra in args.extra)]
        head += [f"Requires-Dist: {requirement}" for requirement in args.requires]
        head += ["Description-Content-Type: text/markdown", ""]
        readme = (ROOT / "crates/qlora-cli/README.md").read_text()
        (info / "METADATA").write_text("\n".join(head) + "\n" + readme)
        lines = ["Wheel-Version: 1.0", "Generator: scripts/dist/wheel.py", "Root-Is-Purelib: false", f"Tag: py3-none-{args.tag}"]
        (info / "WHEEL").write_text("\n".join(lines) + "\n")
        args.out.mkdir(parents=True, exist_ok=True)
        subprocess.run([sys.executable, "-m", "wheel", "pack", "--dest-dir", args.out, folder], check=True)


if __name__ == "__main__":
    main()
