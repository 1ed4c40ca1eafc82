# make run: watch six architectures learn a text.   make test: everything.   make check: format, lint, types, fast tests.
PYTHON ?= python3
TORCH  ?= torch==2.13.0
BIN     = .venv/bin
ARGS   ?=
DTYPES ?= bfloat16 float16 float64

KERNELS = $(wildcard src/everlong/ops/native/*.cpp src/everlong/ops/native/*.h)
PYTEST  = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

.PHONY: run test lint check dtypes asan kernels docs wheel clean

run: .venv/run.stamp
	$(BIN)/everlong compare $(ARGS)

test: .venv/dev.stamp .venv/kernels.stamp
	$(PYTEST)

lint: .venv/dev.stamp
	$(BIN)/ruff format --check src tests
	$(BIN)/ruff check src tests
	$(BIN)/mypy

check: lint .venv/kernels.stamp
	$(PYTEST) -m "not slow"

dtypes: .venv/dev.stamp .venv/kernels.stamp  ## the fast tests under each default dtype of PyTorch
	for dtype in $(DTYPES); do $(PYTEST) -m "not slow" --default-dtype $$dtype || exit 1; done

kernels: .venv/run.stamp  ## build the C++ kernels again
	$(BIN)/python -m pip install --quiet --no-deps --editable .

.venv/kernels.stamp: setup.py $(KERNELS) | .venv/run.stamp
	@{ test ! -e $@ && $(BIN)/python -W error -c "import everlong.ops.native"; } 2> /dev/null \
	  || $(MAKE) --no-print-directory kernels
	@touch $@

# The kernels with GCC's checks of every access to memory, in a package of their own, and the tests that call them.
ASAN = LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0 \
  PYTHONPATH=build/asan
BEST = from everlong.ops.native import supported; print(*dict.fromkeys([supported()[0], 'portable']))
asan: .venv/dev.stamp
	rm -rf build/asan && mkdir -p build/asan && cp -r src/everlong build/asan/
	rm -f build/asan/everlong/ops/native/_*.so
	EVERLONG_SANITIZE=address,undefined EVERLONG_BUILDS="$$($(BIN)/python -c "$(BEST)")" \
	  $(BIN)/python setup.py build_ext --build-lib build/asan --build-temp build/asan-objects
	$(ASAN) OMP_NUM_THREADS=2 $(BIN)/python -m pytest tests/test_native.py tests/test_pointwise.py \
	  tests/test_product.py tests/test_rg_lru_gates.py tests/test_decode.py tests/test_attention_decode.py \
	  tests/test_border.py -k "not compile and not graph and not memory_says"

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
