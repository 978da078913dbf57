# The two commands of the README are `make demo` and `make test`; both set up what they need.
PYTHON ?= python3
# A CPU-only machine wants a CPU build of torch. TORCH_INDEX may name the index that has it.
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
DEVICE ?= auto
VENV := .venv
BIN := $(VENV)/bin

BENCHMARKS := accuracy attention digits experts export fine-tuning generate gguf-engine gguf-sizes gpu kernels kv-cache memory numerics \
  outlier-channels peer-files solver-kernels streaming training

.PHONY: setup native demo test test-interop test-native lint fuzz clean $(addprefix bench-,$(BENCHMARKS))

setup: $(VENV)/.ready native

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "bitgrain needs Python 3.11 or newer, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH)"
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

# The kernels, into build/ and from there beside the Python files; only what changed is compiled again.
native: $(VENV)/.ready
	@test -f build/native/build.ninja || $(BIN)/cmake -S . -B build/native -G Ninja --log-level=WARNING \
	  -DCMAKE_MAKE_PROGRAM="$(CURDIR)/$(BIN)/ninja" -DPython_EXECUTABLE="$(CURDIR)/$(BIN)/python" \
	  -Dnanobind_DIR="$$($(BIN)/python -m nanobind --cmake_dir)" -DBITGRAIN_IN_PLACE=ON $(CMAKE_ARGS)
	@$(BIN)/ninja -C build/native --quiet

demo: setup
	$(BIN)/bitgrain demo --device $(DEVICE)

# The whole suite on the CPU; make test DEVICE=cuda: the tests of the jobs, on a GPU.
test: setup
	$(BIN)/pytest -n auto --dist worksteal $(if $(filter-out auto,$(DEVICE)),--device $(DEVICE)) $(PYTEST_ARGS)

# Engines that take minutes to install. llama.cpp multiplies in float32 if it is built with BLAS (with libopenblas-dev and
# pkg-config: LLAMA_CMAKE_ARGS="-DGGML_BLAS=ON -DGGML_BLAS_VENDOR=OpenBLAS"), and is then compared more strictly.
# GPTQModel, whose torch must not replace this one, is asked where it is installed.
LLAMA_CMAKE_ARGS ?=
$(VENV)/.interop: $(VENV)/.ready
	CMAKE_ARGS="$(LLAMA_CMAKE_ARGS)" $(BIN)/pip install --quiet --editable '.[dev,interop]'
	touch $@

test-interop: setup $(VENV)/.interop
	$(BIN)/pytest -m interop tests/interop $(PYTEST_ARGS)

# Every kernel and level in guarded memory, without Python: as shipped, under the sanitizers, and for Arm where there are
# a cross compiler and qemu. Threads are checked at the plain level alone. ARGS goes to the program:
# make test-native ARGS="--seconds 60 --seed 7"
NATIVE_TESTS = $(BIN)/cmake -S . -G Ninja --log-level=WARNING -DCMAKE_MAKE_PROGRAM="$(CURDIR)/$(BIN)/ninja" \
  -DBITGRAIN_NATIVE_TESTS=ON $(CMAKE_ARGS)
ARM := aarch64-linux-gnu

test-native: $(VENV)/.ready
	@for kind in OFF address thread; do \
	  echo "sanitizers: $$kind"; more="--fork 1"; levels=; \
	  if test $$kind = thread; then more="--fork 0"; levels=-DBITGRAIN_LEVELS=; fi; \
	  $(NATIVE_TESTS) -B build/native-tests-$$kind -DBITGRAIN_SANITIZE=$$kind $$levels > /dev/null && \
	  $(BIN)/ninja -C build/native-tests-$$kind --quiet && \
	  build/native-tests-$$kind/bitgrain_native_tests $$more $(ARGS) || exit 1; \
	done
	@if command -v $(ARM)-g++ > /dev/null && command -v qemu-aarch64 > /dev/null; then \
	  echo "Arm, emulated"; \
	  $(NATIVE_TESTS) -B build/native-tests-arm -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
	    -DCMAKE_CXX_COMPILER=$(ARM)-g++ > /dev/null && $(BIN)/ninja -C build/native-tests-arm --quiet && \
	  qemu-aarch64 -L /usr/$(ARM) build/native-tests-arm/bitgrain_native_tests --fork 0 $(ARGS); \
	else echo "no $(ARM)-g++ or no qemu-aarch64: Arm is not tested"; fi

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# Benchmarks write JSON and a table into benchmarks/results. ARGS goes to the script: make bench-memory ARGS="--help"
$(addprefix bench-,$(BENCHMARKS)): bench-%: setup
	$(BIN)/python benchmarks/$(subst -,_,$*).py $(ARGS)

# Damaged files for every reader, ten minutes each: make fuzz ARGS="--seconds 60 --only gguf"
fuzz: setup
	$(BIN)/python benchmarks/fuzz_readers.py $(ARGS)

clean:
	rm -rf $(VENV) build dist demo-out
