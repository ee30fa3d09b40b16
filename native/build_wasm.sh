#!/bin/sh
# build_wasm.sh PYTHON FOLDER: the forward as WebAssembly, by the clang of the `ziglang` wheel; a page takes the second
# module where WebAssembly.validate accepts it (its multiply-adds round once, as far as the processor has them).
set -e
cd "$(dirname "$0")"
mkdir -p "$2"
build() {
  "$python" -m ziglang c++ -target wasm32-wasi -mexec-model=reactor -std=c++20 -O3 -fno-math-errno -ffp-contract=off -s \
    -I ../include c_api.cpp bounds.cpp codes.cpp dispatch.cpp json.cpp kernels_portable.cpp packed_file.cpp preprocess.cpp \
    processor.cpp vit.cpp vit_build.cpp "$@"
}
python=$1
build -msimd128 -o "$2/sparsemae.wasm"
build -msimd128 -mrelaxed-simd -o "$2/sparsemae-relaxed.wasm"
