#!/usr/bin/env bash
# Makes what a release consists of: archives and Python wheels of the command `qlora`, their checksums and sizes.
#
#   scripts/dist.sh [--target TRIPLE] [--cuda] [--use-binary PATH] [--use-cuda-binary PATH] [--out DIR]
#
#   --target TRIPLE         x86_64-unknown-linux-gnu unless given. aarch64-unknown-linux-gnu is cross-compiled likewise. macOS and
#                           Windows triples are built by cargo on such a machine: no release has been built there yet.
#   --cuda                  also what runs on NVIDIA GPUs; scripts/build-cuda.sh says which toolkit and architectures
#   --use-binary PATH       packs this program instead of building it (the one of the CPU)
#   --use-cuda-binary PATH  the same for the one with CUDA; implies --cuda
#   --out DIR               target/dist-files unless given; what other runs left there stays
#
# Linux programs of the CPU are linked by zig against glibc 2.28 (RHEL 8, Debian 10, Ubuntu 20.04), by cargo-zigbuild; what they then
# need is read from the file and checked. The one with CUDA is linked by the system's compiler and needs the glibc of the machine that
# built it: its wheel's tag says which. Tools come from PyPI into QLORA_TOOLS, ~/.cache/qlora/tools if not set.
# scripts/check-dist.sh installs the files on a bare system.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

target=x86_64-unknown-linux-gnu cuda= binary= cuda_binary= out=target/dist-files
while [ $# -gt 0 ]; do
    case $1 in
    --target) target=$2 && shift ;;
    --cuda) cuda=1 ;;
    --use-binary) binary=$2 && shift ;;
    --use-cuda-binary) cuda=1 cuda_binary=$2 && shift ;;
    --out) out=$2 && shift ;;
    -h | --help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0" && exit 0 ;;
    *) echo "dist: unknown option $1 (see --help)" >&2 && exit 2 ;;
    esac
    shift
done
[ -z "$cuda" ] || [ "$target" = x86_64-unknown-linux-gnu ] || { echo "dist: --cuda is for x86_64-unknown-linux-gnu" >&2 && exit 2; }

glibc=2.28
tools=${QLORA_TOOLS:-$HOME/.cache/qlora/tools}/dist
wants="cargo-zigbuild==0.24.1 ziglang==0.17.1 wheel==0.48.0"
if [ "$(cat "$tools/wants" 2>/dev/null)" != "$wants" ]; then
    python3 -m venv "$tools"
    # shellcheck disable=SC2086
    "$tools/bin/pip" install --quiet $wants
    echo "$wants" >"$tools/wants"
fi
version=$(sed -n '/^\[workspace.package\]/,/^\[/s/^version = "\(.*\)"/\1/p' Cargo.toml)
# Reproducible archives: every file is as old as the commit.
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct)}
export SOURCE_DATE_EPOCH
mkdir -p "$out"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
say() { echo "dist: $*" >&2; }

## The programs
start=$SECONDS
if [ -z "$binary" ]; then
    case $target in
    *-linux-gnu)
        PATH="$tools/bin:$PATH" cargo-zigbuild zigbuild --profile dist --locked -p qlora-cli --target "$target.$glibc" ;;
    *) cargo build --profile dist --locked -p qlora-cli --target "$target" ;;
    esac
    binary=${CARGO_TARGET_DIR:-target}/$target/dist/qlora
    [ -f "$binary" ] || binary=$binary.exe
    say "built $binary in $((SECONDS - start)) s"
fi
case $target in *-linux-gnu) scripts/dist/elf_needs.py "$binary" --glibc $glibc --allow ;; esac
# A program of another system says nothing here.
case $("$binary" --version 2>/dev/null || true) in
"" | "qlora $version") ;;
*) say "$binary is $("$binary" --version), not $version" && exit 1 ;;
esac
if [ -n "$cuda" ]; then
    [ -n "$cuda_binary" ] || { scripts/build-cuda.sh >&2 && cuda_binary=${CARGO_TARGET_DIR:-target}/release/qlora; }
    strip -o "$work/qlora-cuda" "$cuda_binary"
    # What the program that starts it looks for, and the driver.
    known=$(sed -n '/static LINKED/,/^];/s/.*file: "\([^"]*\)".*/\1/p' crates/qlora-cli/src/cuda_libraries.rs)
    # shellcheck disable=SC2086
    scripts/dist/elf_needs.py "$work/qlora-cuda" --allow libcuda.so.1 $known
fi

## What goes with them
scripts/dist/licences.py "$target" ${cuda:+--features cuda} >"$work/THIRD-PARTY-LICENSES.txt"
mkdir "$work/completions"
for pair in bash:qlora.bash zsh:_qlora fish:qlora.fish powershell:_qlora.ps1; do
    if ! "$binary" completions "${pair%%:*}" >"$work/completions/${pair#*:}" 2>/dev/null; then
        say "$binary does not run here: no completions are packed"
        rm -r "$work/completions"
        break
    fi
done

## Archives
archive() { # NAME, then files as PATH=PLACE
    local name=$1 pair path place
    shift
    mkdir "$work/$name"
    for pair in "$@"; do
        path=${pair%%=*} place=$work/$name/${pair#*=}
        mkdir -p "$(dirname "$place")"
        cp "$path" "$place"
        chmod 755 "$place"
    done
    [ ! -d "$work/completions" ] || cp -r "$work/completions" "$work/$name/"
    cp LICENSE-MIT LICENSE-APACHE CHANGELOG.md "$work/THIRD-PARTY-LICENSES.txt" "$work/$name/"
    cp crates/qlora-cli/README.md "$work/$name/README.md"
    case $target in
    *-windows-*) (cd "$work" && "$tools/bin/python" -m zipfile -c "$name.zip" "$name") && mv "$work/$name.zip" "$out/" ;;
    *) tar -C "$work" --sort=name --owner=0 --group=0 --numeric-owner --mtime="@$SOURCE_DATE_EPOCH" -cf - "$name" | gzip -9n >"$out/$name.tar.gz" ;;
    esac
    say "$name: programs of $(find "$work/$name"/bin "$work/$name"/libexec -type f -printf "%s + " 2>/dev/null | sed "s/ + \$//") bytes"
}
exe=
case $target in *-windows-*) exe=.exe ;; esac
archive "qlora-$version-$target-cpu" "$binary=bin/qlora$exe"
[ -z "$cuda" ] || archive "qlora-$version-$target-cuda13" "$binary=bin/qlora" "$work/qlora-cuda=libexec/qlora/qlora-cuda"

## Wheels
wheel() {
    "$tools/bin/python" scripts/dist/wheel.py --out "$out" --version "$version" --licence "$work/THIRD-PARTY-LICENSES.txt" "$@"
}
case $target in
*-linux-gnu)
    # Only where the wheel with CUDA exists; pip skips the requirement elsewhere.
    wheel qlora-cli --tag "$(scripts/dist/elf_needs.py "$binary" --wheel-tag)" --file "$binary=scripts/qlora" \
        --summary "The command qlora: fine-tuning language models with QLoRA, from data to a merged model" --extra cuda \
        --requires "qlora-cli-cu13==$version; extra == 'cuda' and platform_system == 'Linux' and platform_machine == 'x86_64'" ;;
*) say "wheels are made for Linux only" ;;
esac
if [ -n "$cuda" ]; then
    # The versions of cuDNN that crates/qlora-kernels/src/cuda/cudnn/search.rs refuses are left out.
    wheel qlora-cli-cu13 --tag "$(scripts/dist/elf_needs.py "$work/qlora-cuda" --wheel-tag)" \
        --summary "NVIDIA GPUs for the command qlora: its program for CUDA 13. Install qlora-cli[cuda]" \
        --file "$work/qlora-cuda=data/libexec/qlora/qlora-cuda" --requires "qlora-cli==$version" \
        --requires "nvidia-cuda-runtime>=13,<14" --requires "nvidia-cublas>=13,<14" --requires "nvidia-curand>=10.4,<11" \
        --requires "nvidia-cuda-nvrtc>=13,<14" --requires "nvidia-nccl-cu13>=2.18,<3" \
        --requires "nvidia-cudnn-cu13>=9.10.2,<10,!=9.12.*,!=9.25.*,!=9.26.*"
    largest=$(stat -c %s "$out/qlora_cli_cu13-"*.whl | sort -n | tail -n 1)
    [ "$largest" -lt 100000000 ] || { say "the wheel with CUDA has $largest bytes; PyPI takes 100 MB" && exit 1; }
fi

## Checksums and sizes
(
    cd "$out"
    rm -f SHA256SUMS SIZES
    sha256sum -- * >"$work/sums"
    stat -c '%s %n' -- * >"$work/sizes"
    mv "$work/sums" SHA256SUMS
    mv "$work/sizes" SIZES
    cat SIZES
)
say "done: $out"
