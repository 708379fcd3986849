#!/usr/bin/env bash
# Packs the test and bench binaries, built with the feature `cuda`, for GPU machines that have no Rust.
#
#   scripts/gpu-bundle.sh [options]                      here: writes target/qlora-gpu.tar.xz
#   tar xf qlora-gpu.tar.xz && qlora-gpu/run.sh [options]  there: tests one at a time, then the benches
#
#   --out FILE          the archive (a .tar.xz)
#   --tests ARGS        what `cargo test` selects; "--workspace" unless given; such as "-p qlora-kernels --lib"
#   --benches ARGS      what `cargo bench` selects; "--bench train_step" unless given
#   --no-tests, --no-benches
#   --model             packs the demo model (98 MB) too; tests that need it fail without (or: run.sh --model FILE)
#   --dry-run           says what would be built and packed; builds nothing
#
# The build machine needs the CUDA toolkit (scripts/cuda-toolkit.sh makes one without root or a GPU; source its env.sh),
# Python 3 and xz; $CUDA_COMPUTE_CAP chooses the architectures. The GPU machine needs a driver and CUDA's libraries for
# the toolkit's version (cudart, cublas, curand); run.sh looks for them in $CUDA_HOME, in /usr/local/cuda and in the
# wheels that PyTorch installs, and says which are missing. Both need the same processor family and a C library that is
# no older there than here.
#
# Tests read fixtures by the path of the repository they were built in. run.sh puts a link to the packed copy there
# while it runs, where nothing of that name exists. `run.sh --help` lists its options.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$PWD

usage() { sed -n '2,/^set -euo/{/^#/s/^# \{0,1\}//p}' "$root/scripts/gpu-bundle.sh"; }
say() { echo "gpu-bundle: $*" >&2; }
die() { say "$*"; exit 1; }

out=${CARGO_TARGET_DIR:-target}/qlora-gpu.tar.xz
tests=--workspace
benches="--bench train_step"
model=
dry=
while [ $# -gt 0 ]; do
    case $1 in
    --out | --tests | --benches) [ $# -gt 1 ] || die "$1 takes a value" ;;
    esac
    case $1 in
    --out) out=$2 && shift ;;
    --tests) tests=$2 && shift ;;
    --benches) benches=$2 && shift ;;
    --no-tests) tests= ;;
    --no-benches) benches= ;;
    --model) model=1 ;;
    --dry-run) dry=1 ;;
    -h | --help) usage && exit 0 ;;
    *) die "unknown option $1 (--help lists them)" ;;
    esac
    shift
done
case $out in *.tar.xz) ;; *) die "--out must end in .tar.xz" ;; esac
[ -n "$tests$benches" ] || die "neither tests nor benches: nothing to pack"

# What the tests read. Fixtures that are not committed yet travel too.
files=(tests examples scripts 'crates/*/tests' 'Cargo.*' 'crates/*/Cargo.toml' README.md)
commit=$(git rev-parse --short HEAD 2>/dev/null || echo unknown)
[ -z "$(git status --porcelain --untracked-files=no 2>/dev/null)" ] || commit=$commit-dirty

# build KIND ARGS: one line a binary: package's folder, name, executable
build() {
    local kind=$1 message=$work/$1.json
    shift
    say "cargo $kind --no-run --features cuda --locked $*"
    cargo "$kind" --no-run --features cuda --locked --message-format=json-render-diagnostics "$@" >"$message" ||
        die "cargo $kind failed"
    python3 - "$kind" "$root" "$message" <<'PYTHON'
import json, os, sys

kind, root, path = sys.argv[1:]
for line in open(path, encoding="utf-8"):
    # Build scripts may print too.
    if not line.startswith("{"):
        continue
    artifact = json.loads(line)
    if artifact.get("reason") != "compiler-artifact" or not artifact.get("executable"):
        continue
    # `cargo test` builds the examples as well, and `cargo bench` may build the libraries' tests.
    wanted = "bench" in artifact["target"]["kind"] if kind == "bench" else artifact["profile"]["test"]
    if wanted:
        folder = os.path.relpath(os.path.dirname(artifact["manifest_path"]), root)
        print(folder, artifact["target"]["name"], artifact["executable"], sep="\t")
PYTHON
}

# pack KIND < lines of build: strips the binaries into the bundle and lists them for run.sh
pack() {
    local kind=$1 folder name executable file
    mkdir -p "$bundle/$kind"
    while IFS=$'\t' read -r folder name executable; do
        # Two packages may have a test of the same name.
        file=$kind/$(basename "$(cd "$root/$folder" && pwd)")--$name
        [ "$folder" = . ] && file=$kind/$name
        [ ! -e "$bundle/$file" ] || file=$file--lib
        strip -o "$bundle/$file" "$executable"
        printf '%s\t%s\n' "$folder" "$file" >>"$bundle/$kind.txt"
    done
    [ -s "$bundle/$kind.txt" ] || die "no $kind were built: check what is selected"
}

if [ -n "$dry" ]; then
    [ -z "$tests" ] || say "would run: cargo test --no-run --features cuda --locked $tests"
    [ -z "$benches" ] || say "would run: cargo bench --no-run --features cuda --locked $benches"
    count=$(git ls-files -co --exclude-standard -- "${files[@]}" | wc -l)
    say "would pack $count files that tests read, commit $commit"
    [ -z "$model" ] || say "would pack the demo model"
    say "would write $out"
    exit 0
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
bundle=$work/qlora-gpu
mkdir -p "$bundle/repository"
# The selections are words.
# shellcheck disable=SC2086
if [ -n "$tests" ]; then
    build test $tests >"$work/tests"
    pack tests <"$work/tests"
fi
# shellcheck disable=SC2086
if [ -n "$benches" ]; then
    build bench $benches >"$work/benches"
    pack benches <"$work/benches"
fi
git ls-files -z -co --exclude-standard -- "${files[@]}" |
    tar --null --ignore-failed-read -cf - -T - | tar -xf - -C "$bundle/repository"
echo "$root" >"$bundle/built-in.txt"
echo "$commit" >"$bundle/commit.txt"
if [ -n "$model" ]; then
    file=$(./scripts/demo-model.sh)
    install -D "$file" "$bundle/cache/models/SmolLM2-135M-Instruct/$(basename "$file")"
fi

cat >"$bundle/run.sh" <<'RUN'
#!/usr/bin/env bash
# Runs the packed tests (one thread: they share a GPU), then the packed benches.
#
#   ./run.sh [options]
#
#   --out DIR           logs go there; results unless given
#   --no-tests, --no-benches
#   --only TEXT         only test binaries whose name contains TEXT
#   --test-args ARGS    for every test binary, such as "cuda --nocapture"
#   --bench "NAME ARGS" this bench with these arguments, in DIR; repeatable; every bench without arguments unless given
#   --timeout SECONDS   for each binary; 600 unless given
#   --model FILE        SmolLM2-135M-Instruct.Q4_1.gguf, for the tests that need it
#
# Fails if anything failed. $QLORA_COMMIT is the commit the binaries were built from.
set -uo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

out=results tests=1 benches=1 only='' limit=600 model=''
test_args=() chosen=()
while [ $# -gt 0 ]; do
    case $1 in
    --out | --only | --test-args | --bench | --timeout | --model)
        [ $# -gt 1 ] || { echo "$1 takes a value" && exit 2; }
        ;;
    esac
    case $1 in
    --out) out=$2 && shift ;;
    --no-tests) tests= ;;
    --no-benches) benches= ;;
    --only) only=$2 && shift ;;
    --test-args) read -ra test_args <<<"$2" && shift ;;
    --bench) chosen+=("$2") && shift ;;
    --timeout) limit=$2 && shift ;;
    --model) model=$2 && shift ;;
    -h | --help) sed -n '2,/^set -/{/^#/s/^# \{0,1\}//p}' "$here/run.sh" && exit 0 ;;
    *) echo "unknown option $1 (--help lists them)" && exit 2 ;;
    esac
    shift
done
mkdir -p "$out"
out=$(cd "$out" && pwd)

# Tests know their files by the folder they were built in.
root=$(cat "$here/built-in.txt")
cleanup() { [ -z "${linked:-}" ] || rm -f "$root"; }
trap cleanup EXIT
if [ ! -e "$root" ]; then
    if mkdir -p "$(dirname "$root")" && ln -s "$here/repository" "$root"; then
        linked=1
    else
        echo "$root cannot be made: tests that read files will fail"
    fi
fi
[ ! -d "$here/cache" ] || export QLORA_CACHE=$here/cache
if [ -n "$model" ]; then
    export QLORA_CACHE=$out/cache
    mkdir -p "$QLORA_CACHE/models/SmolLM2-135M-Instruct"
    ln -sfn "$(cd "$(dirname "$model")" && pwd)/$(basename "$model")" \
        "$QLORA_CACHE/models/SmolLM2-135M-Instruct/SmolLM2-135M-Instruct.Q4_1.gguf"
fi
QLORA_COMMIT=$(cat "$here/commit.txt")
export QLORA_COMMIT RUST_BACKTRACE=${RUST_BACKTRACE:-1}

first=$(cat "$here"/tests.txt "$here"/benches.txt 2>/dev/null | head -n 1 | cut -f 2)
missing() { ldd "$here/$first" | awk '/not found/ { print $1 }'; }
if [ -n "$(missing)" ]; then
    wheels=$(python3 -c 'import nvidia; print(*nvidia.__path__, sep="\n")' 2>/dev/null)
    for folder in "${CUDA_HOME:-/usr/local/cuda}/lib64" /usr/local/cuda/lib64 "$wheels"/*/lib; do
        [ ! -d "$folder" ] || LD_LIBRARY_PATH=${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$folder
    done
    export LD_LIBRARY_PATH
    [ -z "$(missing)" ] || echo "libraries not found (set LD_LIBRARY_PATH): $(missing | tr '\n' ' ')"
fi
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader | tee "$out/gpu.txt"

failed=0
# one NAME FOLDER COMMAND...: runs it there, keeps its output, prints its last lines
one() {
    local name=$1 folder=$2 start=$SECONDS status
    shift 2
    (cd "$folder" && timeout "$limit" "$@") >"$out/$name.txt" 2>&1
    status=$?
    if [ $status = 0 ]; then
        echo "ok      $name ($((SECONDS - start)) s) $(grep -E '^test result' "$out/$name.txt" | tail -n 1)"
    else
        failed=$((failed + 1))
        [ $status != 124 ] || echo "stopped after $limit s" >>"$out/$name.txt"
        echo "FAILED  $name (status $status); the end of $out/$name.txt:"
        tail -n 25 "$out/$name.txt"
    fi
}

if [ -n "$tests" ] && [ -e "$here/tests.txt" ]; then
    while IFS=$'\t' read -r folder file; do
        [[ $file == *"$only"* ]] || continue
        one "test-$(basename "$file")" "$root/$folder" "$here/$file" --test-threads=1 "${test_args[@]}" </dev/null
    done <"$here/tests.txt"
fi
if [ -n "$benches" ] && [ -e "$here/benches.txt" ]; then
    if [ ${#chosen[@]} = 0 ]; then
        mapfile -t chosen < <(cut -f 2 "$here/benches.txt" | xargs -n 1 basename)
    fi
    number=0
    for line in "${chosen[@]}"; do
        read -ra words <<<"$line"
        number=$((number + 1))
        name=bench-$number-${words[0]}
        if [ ! -x "$here/benches/${words[0]}" ]; then
            echo "FAILED  no bench ${words[0]} in this bundle"
            failed=$((failed + 1))
            continue
        fi
        one "$name" "$out" "$here/benches/${words[0]}" --bench "${words[@]:1}" </dev/null
        cat "$out/$name.txt"
    done
fi
echo "$failed failed" | tee "$out/summary.txt"
[ $failed = 0 ]
RUN
chmod +x "$bundle/run.sh"

mkdir -p "$(dirname "$out")"
tar -C "$work" -cf - qlora-gpu | xz -T0 -6 >"$out.part"
mv -f "$out.part" "$out"
say "$out: $(cat "$bundle"/tests.txt "$bundle"/benches.txt 2>/dev/null | wc -l) binaries, $(du -h "$out" | cut -f 1)"
