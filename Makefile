# make run: watch six architectures learn a text.   make test: everything.   make check: format, lint, types, fast tests.
PYTHON ?= python3
TORCH  ?= torch==2.13.0
BIN     = .venv/bin
ARGS   ?=

.PHONY: run test check docs wheel clean

run: .venv/run.stamp
	$(BIN)/everlong compare $(ARGS)

test: .venv/dev.stamp
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

check: .venv/dev.stamp
	$(BIN)/ruff format --check src tests
	$(BIN)/ruff check src tests
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

docs: .venv/dev.stamp  ## write what is generated from the code: the table in README.md
	$(BIN)/python -m everlong.report.readme README.md

.venv/run.stamp: pyproject.toml
	@echo "Setting up .venv (once; a few minutes) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet $(TORCH)
	@$(BIN)/python -m pip install --quiet --editable .
	@touch $@

.venv/dev.stamp: .venv/run.stamp
	@echo "Adding what the tests need ..."
	@$(BIN)/python -m pip install --quiet --editable ".[dev]"
	@touch $@

wheel: .venv/run.stamp  ## dist/everlong-*.whl, kernels included: it installs without a compiler
	rm -rf build dist
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .
	@ls dist

clean:
	rm -rf .venv build dist src/*.egg-info
