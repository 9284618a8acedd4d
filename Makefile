# lowtide on a fresh machine: Python 3.11 or newer and a C compiler are all that is needed.

PYTHON ?= python3
# The one place of the pin. Torch goes in before the rest: left to the other packages, pip takes whatever build comes first,
# and on Linux x86 that can be gigabytes of CUDA for a machine without a GPU. Where your index offers a CPU-only build, name it:
#     make TORCH="torch==2.13.0+cpu"         or         make TORCH=path/to/torch.whl
TORCH ?= torch==2.13.0
OUT ?= demo
WORKERS ?= 2

BIN := .venv/bin
# One thread for each test worker: two workers that take two threads each on two cores are slower than one.
export OMP_NUM_THREADS ?= 1

.PHONY: demo test lint clean

demo: export OMP_NUM_THREADS = $(shell nproc 2>/dev/null || echo 1)
demo: .venv/.ready
	$(BIN)/lowtide demo --out $(OUT)

test: .venv/.ready
	$(BIN)/python -m pytest -n $(WORKERS)

lint: .venv/.ready
	$(BIN)/ruff check .
	$(BIN)/lint-imports

# A torch that is already there stays.
.venv/.ready: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install $(TORCH)
	$(BIN)/python -m pip install -e ".[dev]"
	touch $@

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .import_linter_cache $(OUT)
	find lowtide tests -name __pycache__ -type d -prune -exec rm -rf {} +
