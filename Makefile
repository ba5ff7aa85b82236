# Everything starts here: each target builds .venv first and needs only Python 3.11, make and gcc.

PYTHON ?= python3.11
BIN = .venv/bin

.PHONY: demo test bench docs lint format

demo: .venv
	$(BIN)/clat demo --overwrite

test: .venv lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal

bench: .venv
	$(BIN)/pip install --quiet --editable '.[bench]'
	TQDM_DISABLE=1 $(BIN)/python bench/run.py

docs: .venv
	$(BIN)/python tools/make_flags.py
	$(BIN)/python tools/docs.py

lint: .venv
	$(BIN)/ruff check src tests tools bench
	$(BIN)/ruff format --check src tests tools bench
	$(BIN)/mypy
	$(BIN)/python tools/house.py

format: .venv
	$(BIN)/ruff check --fix src tests tools bench
	$(BIN)/ruff format src tests tools bench

.venv: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable '.[dev]'
	$(BIN)/pip install --quiet --no-deps torchattacks==3.5.1  # it pins a requests of 2021, which it never imports
	touch .venv
