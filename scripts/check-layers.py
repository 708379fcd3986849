#!/usr/bin/env python3
"""Checks that dependencies point one way, between the crates and between the top-level modules of each crate; and that code for some
operating systems only is in one module of each crate, `src/platform.rs`.

    scripts/check-layers.py [ROOT]
    scripts/check-layers.py --self-test

A top-level module is a file or a folder directly under `src/` (`src/model/` with `src/model.rs` is `model`). It depends on another
if its code names it as `crate::NAME` or, one level up, as `super::NAME` from its own root file; code under `#[cfg(test)]` and
files named `tests.rs`, `*_tests.rs` or `test_support.rs` do not count, nor do comments. `lib.rs` may name everything.

Two modules that reach each other are in one circle. `KNOWN` lists the circles that there are; the check fails for a circle that is not
part of one of these, and for an entry of `KNOWN` that is no circle any more, so that the list only gets shorter.
"""

import pathlib
import re
import sys
import tempfile

# From the lowest: a crate may use those before it.
CRATES = ["qlora-kernels", "qlora-core", "qlora-trainer", "qlora", "qlora-cli"]

KNOWN = {
    # Operations choose their CUDA form themselves, and CUDA code checks and reports as they do.
    "qlora-kernels": [{"cuda", "matrix", "ops", "quant", "sequence", "tensor", "transpose", "view", "weight"}],
    "qlora-core": [{"adapter", "autograd", "companions", "hub", "inspect", "model", "open"}],
    "qlora-trainer": [{"config", "data", "encoder", "objective"}, {"progress", "trainer"}],
}

USE = re.compile(r"\bcrate::(?:\{([^;]*?)\}\s*;|(\w+))", re.S)
COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.S)
# An attribute, or the macro `cfg!`, that asks for an operating system.
SYSTEM = re.compile(r"\bcfg(?:_attr)?!?\([^\]{};]*\b(?:unix|windows|target_os|target_family)\b|\bstd::os::(?:unix|windows|linux)\b")
TESTS = re.compile(r"(?:^tests|_tests|^test_support)$")


def without_tests(text: str) -> str:
    """The text without comments and without `#[cfg(test)]` items."""
    text = COMMENT.sub("", text)
    while (at := text.find("#[cfg(test)]")) >= 0:
        brace, semicolon = text.find("{", at), text.find(";", at)
        if brace < 0 or 0 <= semicolon < brace:
            text = text[:at] + (text[semicolon + 1 :] if semicolon >= 0 else "")
            continue
        depth, end = 0, brace
        while end < len(text):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
            if depth == 0:
                break
        text = text[:at] + text[end:]
    return text


def first_names(group: str):
    """The first names of the paths in `{a::b, c::{d, e}, f}`."""
    depth, name = 0, ""
    for c in group + ",":
        if c == "," and depth == 0:
            if match := re.match(r"\s*(\w+)", name):
                yield match[1]
            name = ""
            continue
        depth += {"{": 1, "}": -1}.get(c, 0)
        name += c


def modules(source: pathlib.Path) -> dict[str, set[str]]:
    """Every top-level module of a crate, with those that it names."""
    files = [path for path in source.rglob("*.rs") if not TESTS.search(path.stem)]
    of = lambda path: path.relative_to(source).parts[0].removesuffix(".rs")
    edges: dict[str, set[str]] = {of(path): set() for path in files if of(path) not in ("lib", "main")}
    for path in files:
        if (module := of(path)) not in edges:
            continue
        text = without_tests(path.read_text())
        for group, name in USE.findall(text):
            edges[module] |= set(first_names(group) if group else [name])
        root = source / f"{module}.rs", source / module / "mod.rs"
        if path in root:
            edges[module] |= set(re.findall(r"\bsuper::(\w+)", text))
    return {module: {name for name in named if name in edges and name != module} for module, named in edges.items()}


def outside_platform(source: pathlib.Path) -> list[str]:
    """The files with code for some operating systems only, besides `platform.rs` and tests."""
    files = [path for path in source.rglob("*.rs") if not TESTS.search(path.stem) and path != source / "platform.rs"]
    return sorted(str(path.relative_to(source)) for path in files if SYSTEM.search(without_tests(path.read_text())))


def circles(edges: dict[str, set[str]]) -> list[frozenset[str]]:
    """The sets of modules that reach each other."""

    def reached(start: str) -> set[str]:
        seen, todo = set(), [start]
        while todo:
            for name in edges[todo.pop()] - seen:
                seen.add(name)
                todo.append(name)
        return seen

    reach = {module: reached(module) for module in edges}
    found = {frozenset(b for b in reach[a] if a in reach[b]) for a in edges if a in reach[a]}
    return sorted(found, key=sorted)


def check(root: pathlib.Path, known: dict[str, list[set[str]]]) -> list[str]:
    problems = []
    folders = {name: root / "crates" / name if name != "qlora" else root for name in CRATES}
    for place, name in enumerate(CRATES):
        manifest = folders[name] / "Cargo.toml"
        if not manifest.exists():
            continue
        text = manifest.read_text().split("[dependencies]", 1)[-1].split("\n[", 1)[0]
        used = set(re.findall(r"^(qlora[\w-]*)\b", text, re.M))
        higher = sorted(used & set(CRATES[place + 1 :]))
        problems += [f"{name} depends on {other}, which is a higher layer" for other in higher]
        for file in outside_platform(folders[name] / "src"):
            problems.append(f"{name}: {file} has code for some operating systems only, which belongs into platform.rs")
        edges = modules(folders[name] / "src")
        found, allowed = circles(edges), known.get(name, [])
        for circle in found:
            if not any(circle <= frozenset(old) for old in allowed):
                ways = [f"{a} -> {b}" for a in sorted(circle) for b in sorted(edges[a] & circle)]
                problems.append(f"{name}: a circle of modules: {', '.join(sorted(circle))} ({'; '.join(ways)})")
        for old in allowed:
            if frozenset(old) not in found:
                problems.append(f"{name}: {', '.join(sorted(old))} in KNOWN is not one circle any more: shorten the entry")
    return problems


def self_test() -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        source = root / "crates/qlora-core/src"
        (source / "model").mkdir(parents=True)
        (root / "crates/qlora-core/Cargo.toml").write_text("[dependencies]\nqlora-kernels = 1\n")
        (source / "lib.rs").write_text("mod model;\nmod text;\nuse crate::model;\n")
        (source / "model/mod.rs").write_text("use crate::{text::Text, error};\n")
        clean = "// use crate::model;\npub struct Text;\n#[cfg(test)]\nmod tests {\n    use crate::model::M;\n}\n"
        (source / "text.rs").write_text(clean)
        assert check(root, {}) == [], check(root, {})
        (source / "text.rs").write_text(clean + "use crate::model::M;\n")
        (problem,) = check(root, {})
        assert "model, text" in problem and "text -> model" in problem, problem
        assert check(root, {"qlora-core": [{"model", "text"}]}) == []
        (source / "text.rs").write_text(clean)
        (problem,) = check(root, {"qlora-core": [{"model", "text"}]})
        assert "not one circle any more" in problem, problem
        for code in ["#[cfg(all(test, not(unix)))]", 'if cfg!(target_os = "linux") {}', "use std::os::unix::fs;"]:
            (source / "text.rs").write_text(f"pub fn f() {{ {code} }}\n")
            (problem,) = check(root, {})
            assert "text.rs has code" in problem, problem
        (source / "text.rs").rename(source / "platform.rs")
        (source / "text.rs").write_text(clean + '#[cfg(feature = "hub")]\n#[cfg(test)]\nmod t {\n    #[cfg(unix)]\n    fn f() {}\n}\n')
        assert check(root, {}) == [], check(root, {})
        (root / "crates/qlora-core/Cargo.toml").write_text("[dependencies]\nqlora-trainer = 1\n")
        (problem,) = check(root, {})
        assert "qlora-core depends on qlora-trainer" in problem, problem
    print("check-layers: the self-test passed")


def main() -> None:
    if sys.argv[1:] == ["--self-test"]:
        return self_test()
    root = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else pathlib.Path(__file__).resolve().parent.parent
    problems = check(root, KNOWN)
    for problem in problems:
        print(problem, file=sys.stderr)
    if problems:
        sys.exit(1)
    print("dependencies point one way, but for the circles in KNOWN; platform.rs alone asks for the operating system")


if __name__ == "__main__":
    main()
