#!/bin/sh
# build_wasm.sh PYTHON FOLDER: the forward as WebAssembly, by the clang of the `ziglang` wheel; a page takes the second
# module where WebAssembly.validate accepts it (its multiply-adds round once, as far as the processor has them).
set -e
cd "$(dirname "$0")"
python=$1
folder=$2
mkdir -p "$folder"
objects=$(mktemp -d)
trap 'rm -r "$objects"' EXIT

zig() {
  "$python" -m ziglang c++ -target wasm32-wasi -mexec-model=reactor -std=c++20 -fno-math-errno -ffp-contract=off \
    -fignore-exceptions -I ../include "$@"
}

# What computes for speed, what reads files, and the libraries, for size.
build() {
  module=$1
  shift
  zig -O3 -mllvm -unroll-runtime=false "$@" -c kernels_portable.cpp -o "$objects/kernels_portable.o"
  for file in bounds c_api codes dispatch json packed_file packed_preprocess packed_segment preprocess processor vit vit_build; do
    zig -Oz "$@" -c $file.cpp -o "$objects/$file.o"
  done
  zig -Oz "$@" -s "$objects"/*.o -o "$folder/$module"
}
build sparsemae.wasm -msimd128
build sparsemae-relaxed.wasm -msimd128 -mrelaxed-simd
