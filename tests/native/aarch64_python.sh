#!/bin/sh
# aarch64_python.sh PYTHON FOLDER CONSTRAINTS: Debian's Python for aarch64 and musl's loader in FOLDER/root, for qemu-aarch64
# -L, and numpy, pillow and safetensors for it in FOLDER/site. Nothing is installed into the system.
set -e
python=$1
folder=$2
mkdir -p "$folder/state/lists/partial" "$folder/cache/archives/partial" "$folder/debs" "$folder/root"
touch "$folder/state/status"
from=$(apt-get indextargets --format '$(REPO_URI) $(RELEASE)' | head -n 1) # the archive that this machine has
echo "deb $from main" > "$folder/sources.list"
apt="-qq -o APT::Architecture=arm64 -o APT::Architectures=arm64 -o APT::Sandbox::User=root -o Dir::State=$folder/state
  -o Dir::State::status=$folder/state/status -o Dir::Cache=$folder/cache -o Dir::Etc::sourcelist=$folder/sources.list
  -o Dir::Etc::sourceparts=-"
apt-get $apt update
cd "$folder/debs"
apt-get $apt download python3.11-minimal libpython3.11-minimal libpython3.11-stdlib libc6 libexpat1 zlib1g libgcc-s1 \
  libstdc++6 libbz2-1.0 liblzma5 libffi8 libssl3 libuuid1 libcrypt1 musl
for file in *.deb; do dpkg -x "$file" "$folder/root"; done
"$python" -m pip install --quiet --target "$folder/site" --python-version 3.11 --only-binary :all: --constraint "$3" \
  --platform manylinux2014_aarch64 --platform manylinux_2_27_aarch64 --platform manylinux_2_28_aarch64 \
  numpy pillow safetensors
