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

.PHONY: demo test slow lint docs peers table clean

$(READY): pyproject.toml
	test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet -e ".[dev]"
	touch $(READY)

demo: $(READY)
	$(BIN)/lowtide demo --out demo

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) -m "not slow"

slow: $(READY)
	$(BIN)/python -m pytest -q -m slow

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

# The documentation site, in build/site. A broken link or reference is an error.
docs: $(READY)
	$(BIN)/pip install --quiet -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Other quantizers at the same bits, in an environment of their own (bench/.venv-peers); hours on a slow machine, goes on when interrupted.
# Minutes instead: make QUICK=--quick peers
peers:
	TORCH="$(TORCH)" $(PYTHON) bench/peers.py $(QUICK)

# The README's table, one line for each model and width; goes on when interrupted. Minutes instead of hours: make QUICK=--quick table
table: $(READY)
	TORCH="$(TORCH)" $(BIN)/python bench/table.py $(QUICK)

clean:
	rm -rf .venv demo build *.egg-info
