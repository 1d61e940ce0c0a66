# Everything runs in .venv, made on first use. TORCH_INDEX=URL takes torch from a package index of your choice
# (a CPU or a particular CUDA build).
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt
TORCH := torch==2.13.0 $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))

.PHONY: demo test lint bench docs clean

demo: .venv/.runtime
	$(BIN)/jiio demo

test: .venv/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2

lint: .venv/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

bench: .venv/.runtime
	$(PIP) -e '.[torchdeq]'
	$(BIN)/jiio bench

docs: .venv/.runtime
	$(PIP) -e '.[docs]'
	$(BIN)/mkdocs build --strict

clean:
	rm -rf .venv site

# torch first and pinned: left to choose, pip takes a build with gigabytes of CUDA
.venv/.runtime: pyproject.toml constraints.txt
	@test -d .venv || $(PYTHON) -m venv .venv
	@echo "installing into .venv (once; a few minutes)"
	$(PIP) $(TORCH)
	$(PIP) -e .
	@touch $@

.venv/.dev: .venv/.runtime
	$(PIP) -e '.[dev]'
	@touch $@
