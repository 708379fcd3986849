#!/usr/bin/env bash
# Puts a CUDA 13.0 toolkit together from NVIDIA's PyPI wheels, for machines without a GPU or a CUDA installation.
#
#   scripts/cuda-toolkit.sh DIR && . DIR/env.sh && cargo build --features cuda
#
# That is enough to compile and link; running needs a GPU machine with driver 580 or newer.
set -euo pipefail

dir=${1:?usage: scripts/cuda-toolkit.sh DIR}
mkdir -p "$dir"
dir=$(cd "$dir" && pwd)

if [ -f "$dir/env.sh" ] && [ -x "$dir/bin/nvcc" ]; then
    echo "CUDA toolkit in $dir is complete"
    exit 0
fi

python=${PYTHON:-python3}
[ -x "$dir/venv/bin/pip" ] || "$python" -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet \
    nvidia-cuda-nvcc==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-nvrtc==13.0.88 \
    nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85 nvidia-curand==10.4.0.35 "nvidia-cublas==13.1.*"
wheels=$("$dir/venv/bin/python" -c 'import nvidia, os; print(os.path.join(list(nvidia.__path__)[0], "cu13"))')

for part in bin include nvvm; do
    ln -sfn "$wheels/$part" "$dir/$part"
done

# The linker looks for unversioned names, which the wheels do not carry.
mkdir -p "$dir/lib64/stubs"
for library in "$wheels"/lib/*; do
    ln -sf "$library" "$dir/lib64/"
done
for library in "$dir"/lib64/*.so.*; do
    ln -sf "$library" "${library%%.so*}.so"
done

# libcuda.so comes with the driver. A stub that exports every driver function stands in for it at link time.
{
    grep -oE 'CUDAAPI *\*? *cu[A-Za-z0-9_]+' "$wheels/include/cuda.h" | grep -oE 'cu[A-Z][A-Za-z0-9_]+'
    grep -oE '\bcu[A-Z][A-Za-z0-9]+_v[0-9]+(_pt[ds][sz])?\b' "$wheels/include/cuda.h"
} | sort -u | sed 's/.*/void &(void) {}/' >"$dir/stub.c"
gcc -shared -fPIC -w -Wl,-soname,libcuda.so.1 -o "$dir/lib64/stubs/libcuda.so" "$dir/stub.c"

cat >"$dir/env.sh" <<EOF
export CUDA_HOME="$dir" CUDA_PATH="$dir" PATH="$dir/bin:\$PATH"
export CUDA_COMPUTE_CAP="\${CUDA_COMPUTE_CAP:-90}"
export LIBRARY_PATH="$dir/lib64:$dir/lib64/stubs\${LIBRARY_PATH:+:\$LIBRARY_PATH}"
export CUDAFORGE_THREADS="\${CUDAFORGE_THREADS:-\$(nproc)}"
EOF
echo "CUDA toolkit in $dir; next: . $dir/env.sh"
