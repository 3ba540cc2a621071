# Every target works from a fresh clone: Python >= 3.11, pip, a C++ compiler and make are all it needs.
# No environment has to be activated; everything runs from .venv, which `make venv` creates and fills.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
# A file's tests stay in one process, as they share runs, and files run in the order of tests/conftest.py; more workers than
# cores would only wait for one another.
TEST_FLAGS ?= -n 2 --dist loadfile --no-loadscope-reorder
BENCH ?= step --model deit_tiny_patch16_224 --batch 16 --n_bits 2

# DeepSpeed compiles a small C++ op on first use: ninja must be on PATH, and the build stays inside .venv.
IN_VENV := PATH="$(CURDIR)/$(BIN):$$PATH"
export TORCH_EXTENSIONS_DIR ?= $(CURDIR)/.venv/torch_extensions

.DEFAULT_GOAL := help
.PHONY: help venv demo test lint bench gpu clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-7s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: $(INSTALLED)  ## create .venv and install the project with its development tools into it

# --no-compile: Python compiles what it imports when it does; to compile all of it takes pip most of a minute.
$(INSTALLED): pyproject.toml
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { \
	  $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' && $(PYTHON) -m venv .venv; } || { \
	  echo "cannot create .venv: dsquant needs Python >= 3.11 with venv; choose one: make venv PYTHON=python3.12" >&2; \
	  exit 1; }
	@echo "installing into .venv (once; a few minutes, about 6 GB with PyTorch for CUDA) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --editable '.[dev]'
	@echo "compiling DeepSpeed's CPU communication op (once; under a minute) ..."
	@$(IN_VENV) python -c 'from dsquant.engine import init_world; init_world()' >/dev/null
	@touch $@

demo: venv  ## train the 2-bit digits model end to end and show the closing table
	$(IN_VENV) deepspeed dsquant/train.py --ds_config ds_configs/zero2.json

test: venv  ## run the tests
	$(IN_VENV) python -m pytest -q $(TEST_FLAGS)

lint: venv  ## check style and formatting
	$(IN_VENV) ruff check .
	$(IN_VENV) ruff format --check .

bench: venv  ## time float against quantized training (BENCH="..." for other arguments)
	$(IN_VENV) python tools/bench.py $(BENCH)

gpu: venv  ## on a machine with a GPU: check its kernels, and time them into docs/results/gpu-*.json
	$(IN_VENV) python -m dsquant.ops
	$(IN_VENV) DSQ_TEST_DEVICE=cuda python -m pytest -q -n 8 tests/ops/gpu
	$(IN_VENV) python tools/bench.py ops --device=cuda --out=docs/results/gpu-ops.json
	$(IN_VENV) python tools/bench.py packed --device=cuda --shapes=768x3072,4096x4096 --m=1,12608 --out=docs/results/gpu-packed.json
	for model in deit_small_patch16_224:2048 swin_tiny_patch4_window7_224:1024; do \
	  $(IN_VENV) python tools/bench.py step --model $${model%:*} --batch $${model#*:} --steps 5 \
	    --out=docs/results/gpu-step-$${model%%_patch*}.json || exit 1; done

clean:  ## remove caches and build output; .venv and runs stay
	rm -rf build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +
