#!/usr/bin/env bash
# Packs the Python packages of the peers (peers.py) that a GPU machine without a network lacks.
#
#   scripts/bench/main_job/peers_bundle.sh peers.tar.xz            here
#   mkdir -p /tmp/site && tar xf peers.tar.xz -C /tmp/site          there; then PYTHONPATH=/tmp/site
#
# For Python 3.12 on x86-64 Linux with torch 2.11 (CUDA 13.0), triton 3.6, transformers 5.17, peft 0.21, accelerate 1.15,
# pyarrow, pandas, tokenizers and huggingface_hub, which have to be there: the versions below are the newest that go with
# them. xformers goes to a folder of its own, so that it can be left out, with the CUDA 12 runtime that its wheel is linked
# against. Left out of the wheels: libraries of other CUDA versions, Unsloth's studio and command line, tests.
set -euo pipefail
[ $# = 1 ] || { sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0" && exit 2; }

packages=(
    bitsandbytes==0.50.2 trl==1.15.0 unsloth==2026.10.9 unsloth_zoo==2026.10.9 liger_kernel==0.8.5
    # What they need.
    datasets==4.8.5 dill==0.4.1 multiprocess==0.70.19 cut_cross_entropy==25.1.1 torchao==0.18.0
    tyro==1.0.17 typeguard==4.6.1 docstring_parser==0.18.0 shtab==1.13.0 msgspec==0.23.0 hf_transfer==0.1.9
    nest_asyncio==1.6.0
)
platforms=()
for tag in manylinux_2_28 manylinux_2_27 manylinux_2_24 manylinux_2_17 manylinux2014 manylinux1; do
    platforms+=(--platform "${tag}_x86_64")
done
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# get FOLDER PACKAGES: their wheels unpacked there
get() {
    local folder=$1
    shift
    python3 -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
        "${platforms[@]}" -d "$folder.wheels" "$@"
    mkdir -p "$folder"
    for wheel in "$folder.wheels"/*.whl; do python3 -m zipfile -e "$wheel" "$folder"; done
}
get "$work/site" "${packages[@]}"
get "$work/xformers" xformers==0.0.35
get "$work/cudart" nvidia-cuda-runtime-cu12==12.8.90
mkdir "$work/xformers/lib"
cp "$work/cudart"/nvidia/cuda_runtime/lib/libcudart.so.12 "$work/xformers/lib/"
mv "$work/xformers" "$work/site/with_xformers"

cd "$work/site"
find bitsandbytes -name 'libbitsandbytes_*' ! -name '*_cuda130.so' ! -name '*_cpu.so' -delete
rm -rf studio unsloth_cli tests
find . -type d \( -name tests -o -name test -o -name __pycache__ \) -prune -exec rm -rf {} +
cd - >/dev/null
tar -C "$work/site" -cf - . | xz -T0 -9 >"$1.part"
mv -f "$1.part" "$1"
echo "$1: $(du -h "$1" | cut -f 1)"
