#!/usr/bin/env bash
# Installs what scripts/dist.sh made for x86-64 Linux on a bare Debian without Rust, and uses it: the archive unpacked, the wheel by pip,
# each with --version, doctor, and a run on the CPU.
#
#   scripts/check-dist.sh [DIR]        target/dist-files unless given; as root (a chroot with a mount namespace of its own)
#
# The system is the oldest Debian that is still served, bullseye with glibc 2.31; QLORA_DEBIAN and QLORA_MIRROR name another, such as
# buster (2.28) where an archive of it is within reach. It is made once, in QLORA_TOOLS (~/.cache/qlora/tools if not set), by debootstrap.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
files=$(realpath "${1:-target/dist-files}")
suite=${QLORA_DEBIAN:-bullseye}
base=${QLORA_TOOLS:-$HOME/.cache/qlora/tools}/$suite
triple=x86_64-unknown-linux-gnu

step() { printf '\n== %s\n' "$*"; }

step "checksums"
(cd "$files" && sha256sum --check --quiet SHA256SUMS && wc -l <SHA256SUMS)

if [ ! -e "$base/made" ]; then
    step "a Debian $suite in $base"
    command -v debootstrap >/dev/null || apt-get install -y debootstrap
    rm -rf "$base"
    debootstrap --variant=minbase --include=python3-venv,python3-pip "$suite" "$base" ${QLORA_MIRROR:+"$QLORA_MIRROR"}
    touch "$base/made"
fi
here=$base/check
rm -rf "$here"
mkdir "$here"
cp "$files"/*-"$triple"-*.tar.gz "$files"/*_x86_64.whl "$here/"
scripts/tiny_model.py "$here/model" "$here/rows.jsonl"

# Runs a script in the system, which has neither network nor card; its /proc and /dev vanish with it.
inside() {
    unshare --mount --net --pid --fork bash -euc '
        mount -t proc proc "$0/proc"
        mount -t tmpfs tmpfs "$0/dev"
        for device in null zero urandom; do touch "$0/dev/$device" && mount --bind "/dev/$device" "$0/dev/$device"; done
        exec chroot "$0" /usr/bin/env -i PATH=/usr/local/bin:/usr/bin:/bin HOME=/root HF_HUB_OFFLINE=1 LC_ALL=C /bin/sh -euc "cd /check; $1"
    ' "$base" "$1"
}

use='
    check() {
        "$1" --version
        "$1" doctor
        rm -rf output
        "$1" train model rows.jsonl --max-steps 3 --per-device-train-batch-size 2 --r 4 --output-dir output --no-tui -q
        test -s output/adapter_model.safetensors
        "$1" generate --adapter output --max-new-tokens 4 "2 and 2: " >answer
        echo "trained and answered"
    }'

step "the system: no Rust, no compiler"
inside 'ldd --version | head -n 1; for tool in rustc cargo cc nvcc; do ! command -v $tool || exit 1; done; echo "neither rustc, cargo, cc nor nvcc"'

step "the archive"
inside "$use
    mkdir archive; tar -C archive --strip-components=1 -xzf qlora-*-$triple-cpu.tar.gz; ls archive
    test -s archive/completions/qlora.bash -a -s archive/LICENSE-MIT -a -s archive/THIRD-PARTY-LICENSES.txt -a -s archive/README.md
    check archive/bin/qlora"

step "the wheel"
inside "$use
    python3 -m venv wheel; wheel/bin/pip install --quiet --no-index --find-links . qlora-cli
    wheel/bin/pip list 2>/dev/null | grep qlora
    check wheel/bin/qlora
    wheel/bin/pip uninstall --quiet --yes qlora-cli; ! test -e wheel/bin/qlora"

# Fails unless a command fails and says what it should.
refused='
    refused() {
        expected=$1; shift
        if "$@" >said 2>&1; then echo "no error: $*"; exit 1; fi
        cat said
        grep -qF "$expected" said || { echo "that does not say: $expected"; exit 1; }
    }
    generate="generate --model model --max-new-tokens 4 x"'

if compgen -G "$here/*-cuda13.tar.gz" >/dev/null; then
    step "the archive with CUDA: no driver, the CPU"
    inside "$use $refused
        mkdir cuda; tar -C cuda --strip-components=1 -xzf qlora-*-$triple-cuda13.tar.gz; ls cuda/bin cuda/libexec/qlora
        check cuda/bin/qlora
        cuda/bin/qlora \$generate 2>said >answer; grep 'no NVIDIA driver' said
        refused 'error while loading shared libraries' cuda/libexec/qlora/qlora-cuda --version
        refused 'no NVIDIA driver' env QLORA_BACKEND=cuda cuda/bin/qlora \$generate"

    step "the archive with CUDA: a card and no libraries"
    inside "$refused
        mkdir driver; touch driver/libcuda.so.1 /dev/nvidia0; export LD_LIBRARY_PATH=/check/driver
        refused \"pip install 'nvidia-cuda-runtime==13.*' 'nvidia-cublas==13.*' 'nvidia-curand==10.*'\" cuda/bin/qlora \$generate
        refused 'libcublasLt.so.13' cuda/bin/qlora doctor
        QLORA_BACKEND=cpu cuda/bin/qlora \$generate >answer; echo 'QLORA_BACKEND=cpu: answered'"

    step "the wheel with CUDA"
    # NVIDIA's packages are 1.4 GB, so their names are checked and the rest is installed without them.
    inside "$use
        python3 -m venv cudawheel
        cudawheel/bin/pip install --quiet --no-index --find-links . --no-deps qlora-cli qlora-cli-cu13 || {
            echo 'this system is older than the wheel with CUDA: unpacked by hand'
            cudawheel/bin/pip install --quiet --no-index --find-links . qlora-cli
            cd cudawheel; python3 -m zipfile -e /check/qlora_cli_cu13-*.whl .; mv qlora_cli_cu13-*.data/data/libexec .
            chmod 755 libexec/qlora/qlora-cuda; cd ..
        }
        test -x cudawheel/libexec/qlora/qlora-cuda
        check cudawheel/bin/qlora"
fi

step "all of it was installed and ran"
