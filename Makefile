# make demo: quantize the embedded model and draw what was lost.   make test: the whole suite.   Both set up what they need.

PYTHON ?= python3
# torch goes in first and pinned, so that no other package chooses its build. Where the index serves CUDA builds by default
# (Linux x86), point pip at CPU wheels before this, or it brings gigabytes of CUDA libraries.
# With a GPU: make TORCH=torch demo
TORCH ?= torch==2.13.0
BIN := .venv/bin
READY := .venv/.ready
# One OpenMP thread per test process; two processes for two cores.
WORKERS ?= 2
PYTEST := -m pytest -q -n $(WORKERS) -m "not slow"

.PHONY: demo test slow mutants faults fuzz sanitize lint docs wheel-check compat compat-lowest compat-newest diffusers-tests peers table clean

# What the native kernels are built from.
NATIVE := setup.py $(wildcard lowtide/kernels/native/*)

$(READY): pyproject.toml $(NATIVE)
	test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet -e ".[dev]"
	touch $(READY)

demo: $(READY)
	$(BIN)/lowtide demo --out demo

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST)

slow: $(READY)
	$(BIN)/python -m pytest -q -m slow

# Which changes of one expression no test notices; an estimated hour on two cores. docs/mutants.md says what it found.
mutants: $(READY)
	$(BIN)/pip install --quiet -e ".[mutants]"
	OMP_NUM_THREADS=1 $(BIN)/python tools/mutants.py --max-children $(WORKERS)

# Faults by the thousand: damaged checkpoints, killed commands, a folder with two writers and a reader. Hours on two busy cores;
# fewer: .venv/bin/python bench/faults.py kills --count 20.
FAULTS := PYTHONPATH=.:tests OMP_NUM_THREADS=1 $(BIN)/python bench/faults.py
faults: $(READY)
	$(FAULTS) checkpoints
	$(FAULTS) events
	$(FAULTS) kills
	$(FAULTS) readers

# Headers, plans, indexes and configurations at random for an hour: anything but one sentence ends it. Shorter: make FUZZ_SECONDS=60 fuzz
FUZZ_SECONDS ?= 3600
fuzz: $(READY)
	$(BIN)/pip install --quiet -e ".[fuzz]"
	mkdir -p build/fuzz
	PYTHONPATH=.:bench OMP_NUM_THREADS=1 $(BIN)/python tools/fuzz_loader.py build/fuzz/corpus -artifact_prefix=build/fuzz/ \
		-max_total_time=$(FUZZ_SECONDS)

# The tests of the native kernels against a build that stops at undefined behaviour and at memory errors.
# setup.py says what the flags mean; its own build has Python's -fwrapv, which would hide overflows.
SANITIZED := build/sanitize/_native.so
SANITIZERS := -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer
SANITIZED_FLAGS := -std=c++17 -O1 -g -fPIC -shared -pthread -ffp-contract=off -Wall -Wextra -Wno-psabi \
	-Wno-uninitialized -Wno-maybe-uninitialized

$(SANITIZED): Makefile $(NATIVE)
	mkdir -p $(@D)
	$(CXX) $(SANITIZED_FLAGS) $(SANITIZERS) -o $@ $(filter %.cpp,$(NATIVE))

sanitize: $(READY) $(SANITIZED)
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so)" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
		OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -s --native $(SANITIZED) tests/kernels/test_native_*.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/basedpyright --level error

# The documentation site, in build/site. A broken link or reference is an error.
docs: $(READY)
	$(BIN)/pip install --quiet -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Build the wheel, install it without extras into a fresh environment and use it there.
wheel-check:
	$(PYTHON) tests/clean_install.py "$(TORCH)"

# The fast part of the suite with the lowest and the newest torch and diffusers that pyproject.toml allows, each pair in an
# environment of its own. To keep one torch on both sides: make COMPAT_LOWEST_TORCH=torch==2.13.0 COMPAT_NEWEST_TORCH=torch==2.13.0 compat
COMPAT_LOWEST_TORCH ?= $(shell $(PYTHON) tests/bounds.py lowest torch)
COMPAT_NEWEST_TORCH ?= $(shell $(PYTHON) tests/bounds.py newest torch)
COMPAT_LOWEST_DIFFUSERS ?= $(shell $(PYTHON) tests/bounds.py lowest diffusers)
COMPAT_NEWEST_DIFFUSERS ?= $(shell $(PYTHON) tests/bounds.py newest diffusers)
COMPAT_TESTS ?= $(addprefix tests/,formats kernels nn models stages methods) $(wildcard tests/checkpoint tests/test_checkpoint.py)

compat: compat-lowest compat-newest

compat-lowest: COMPAT_PACKAGES = "$(COMPAT_LOWEST_TORCH)" "$(COMPAT_LOWEST_DIFFUSERS)"
compat-newest: COMPAT_PACKAGES = "$(COMPAT_NEWEST_TORCH)" "$(COMPAT_NEWEST_DIFFUSERS)"
compat-lowest compat-newest:
	test -d .venv-$@ || $(PYTHON) -m venv .venv-$@
	.venv-$@/bin/pip install --quiet --upgrade $(COMPAT_PACKAGES) -e ".[dev]"
	.venv-$@/bin/pip list | grep -E "^(torch|diffusers|transformers|numpy) "
	OMP_NUM_THREADS=1 .venv-$@/bin/python $(PYTEST) $(COMPAT_TESTS)

# diffusers' own tests of quantizers, from a checkout of the version that is installed.
DIFFUSERS_SOURCE ?= build/diffusers
build/diffusers:
	git clone --quiet --depth 1 https://github.com/huggingface/diffusers $@ \
		--branch "v$$($(BIN)/python -c 'import diffusers; print(diffusers.__version__)')"

diffusers-tests: $(READY) $(DIFFUSERS_SOURCE)
	DIFFUSERS_SOURCE="$(abspath $(DIFFUSERS_SOURCE))" OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -o addopts= \
		-n $(WORKERS) tools/diffusers_tests.py

# Other quantizers at the same bits, in an environment of their own (bench/.venv-peers); hours on a slow machine, goes on when interrupted.
# Minutes instead: make QUICK=--quick peers
peers:
	TORCH="$(TORCH)" $(PYTHON) bench/peers.py $(QUICK)

# The table of docs/measured.md, one line for each model and width; goes on when interrupted. Minutes instead of hours: make QUICK=--quick table
table: $(READY)
	TORCH="$(TORCH)" $(BIN)/python bench/table.py $(QUICK)

clean:
	rm -rf .venv .venv-compat-* demo build mutants *.egg-info lowtide/kernels/_native*.so
