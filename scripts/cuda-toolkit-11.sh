#!/usr/bin/env bash
# Puts a CUDA 11.8 toolkit with gcc 11 together from Debian 12's packages (the component non-free), without installing any: for
# programs that run under drivers from 520 on (book/src/guide/cuda-builds.md).
#
#   scripts/cuda-toolkit-11.sh DIR && . DIR/env.sh && scripts/build-cuda.sh --example finetune
#
# Needs Debian 12, for apt-get, and 4 GB in DIR while it runs (1.5 GB afterwards). Root, the system's packages and its gcc stay as they are.
set -euo pipefail

dir=${1:?usage: scripts/cuda-toolkit-11.sh DIR}
mkdir -p "$dir"
dir=$(cd "$dir" && pwd)
if [ -f "$dir/env.sh" ] && [ -x "$dir/bin/nvcc" ]; then
    echo "CUDA toolkit in $dir is complete"
    exit 0
fi

# The same mirror as the system's, with one more component, in lists of our own.
read -r mirror release < <(apt-get indextargets --format '$(REPO_URI) $(RELEASE)' 'Created-By: Packages' 'Component: main' |
    grep -E ' bookworm$' | sort -u) || { echo "cuda-toolkit-11: no Debian 12 (bookworm) among apt's sources" >&2 && exit 1; }
apt=$dir/apt
mkdir -p "$apt/lists/partial" "$apt/cache/archives/partial" "$apt/packages" "$dir/root"
echo "deb $mirror $release main non-free" >"$apt/sources.list"
options=(-o APT::Sandbox::User=root -o "Dir::Etc::sourcelist=$apt/sources.list" -o Dir::Etc::sourceparts=- -o "Dir::State::lists=$apt/lists" -o "Dir::Cache=$apt/cache")
apt-get "${options[@]}" -qq update
(cd "$apt/packages" && apt-get "${options[@]}" -qq download \
    nvidia-cuda-toolkit nvidia-cuda-dev libcudart11.0 libcublas11 libcublaslt11 libcurand10 libnvrtc11.2 libnvrtc-builtins11.8 libnvvm4 \
    libthrust-dev libcub-dev libcu++-dev gcc-11 g++-11 cpp-11 gcc-11-base libgcc-11-dev libstdc++-11-dev libasan6 libtsan0)

# What nothing here links: most of the size.
for package in "$apt/packages"/*.deb; do
    dpkg-deb --fsys-tarfile "$package" | tar -x -C "$dir/root" --exclude='*_static*.a' --exclude='./usr/share' --exclude='*libcusolver*' \
        --exclude='*libcusparse*' --exclude='*libcufft*' --exclude='*libnpp*' --exclude='*libnvjpeg*' --exclude='*libnvblas*'
done
rm -rf "$apt"

# Debian spreads the toolkit over the system; nvcc gets its usual folder back.
root=$dir/root/usr
mkdir -p "$dir/bin" "$dir/include" "$dir/lib64/stubs" "$dir/nvvm/bin" "$dir/nvvm/libdevice"
cp -L "$root/lib/nvidia-cuda-toolkit/bin/nvcc" "$root"/bin/{ptxas,fatbinary,cudafe++,nvlink,bin2c} "$dir/bin/"
cp -rL "$root/lib/nvidia-cuda-toolkit/bin/crt" "$dir/bin/"
cp -L "$root/lib/nvidia-cuda-toolkit/bin/cicc" "$dir/nvvm/bin/"
cp -L "$root"/lib/nvidia-cuda-toolkit/libdevice/* "$dir/nvvm/libdevice/"
cat >"$dir/bin/nvcc.profile" <<'PROFILE'
TOP                = $(_HERE_)/..
NVVMIR_LIBRARY_DIR = $(TOP)/nvvm/libdevice
PATH              += $(TOP)/nvvm/bin:$(_HERE_):
INCLUDES          += "-I$(TOP)/include" $(_SPACE_)
LIBRARIES         =+ $(_SPACE_) "-L$(TOP)/lib64/stubs" "-L$(TOP)/lib64"
PROFILE
for header in "$root"/include/*; do
    case ${header##*/} in
    c++ | x86_64-linux-gnu) ;;
    *) ln -sfn "$header" "$dir/include/" ;;
    esac
done
for library in "$root"/lib/x86_64-linux-gnu/lib{cudart,cublas,cublasLt,curand,nvrtc}*.so*; do
    ln -sf "$library" "$dir/lib64/"
done
ln -sf "$root/bin/x86_64-linux-gnu-g++-11" "$dir/bin/g++-11"

# libcuda.so comes with the driver. A stub that exports every driver function stands in for it at link time.
{
    grep -oE 'CUDAAPI *\*? *cu[A-Za-z0-9_]+' "$dir/include/cuda.h" | grep -oE 'cu[A-Z][A-Za-z0-9_]+'
    grep -oE '\bcu[A-Z][A-Za-z0-9]+_v[0-9]+(_pt[ds][sz])?\b' "$dir/include/cuda.h"
} | sort -u | sed 's/.*/void &(void) {}/' >"$dir/stub.c"
gcc -shared -fPIC -w -Wl,-soname,libcuda.so.1 -o "$dir/lib64/stubs/libcuda.so" "$dir/stub.c"

cat >"$dir/env.sh" <<EOF
export CUDA_HOME="$dir" CUDA_PATH="$dir" PATH="$dir/bin:\$PATH" NVCC_CCBIN="$root/bin/x86_64-linux-gnu-g++-11"
export LIBRARY_PATH="$dir/lib64:$dir/lib64/stubs\${LIBRARY_PATH:+:\$LIBRARY_PATH}"
# nvcc and its compiler need libraries of their own.
export LD_LIBRARY_PATH="$root/lib/x86_64-linux-gnu\${LD_LIBRARY_PATH:+:\$LD_LIBRARY_PATH}"
export CUDAFORGE_THREADS="\${CUDAFORGE_THREADS:-\$(nproc)}"
EOF
echo "CUDA 11.8 in $dir; next: . $dir/env.sh && scripts/build-cuda.sh"
