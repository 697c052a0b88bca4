# `make demo` and `make test` need nothing but Python 3.11 or newer and a package registry.
PYTHON ?= python3
# BIN=FOLDER uses another interpreter and its installed packages, for example those of a GPU image.
BIN := .venv/bin
# Processes that test at once; each may start several ranks.
WORKERS ?= 2
INSTALLED := $(if $(filter .venv/bin,$(BIN)),.venv/installed)

.PHONY: demo test test-all test-gpu check mutants bench bench-gpu megablocks clean

demo: .venv/installed
	$(BIN)/python -m data_pipeline experiment=demo
	$(BIN)/python -m trainer experiment=demo
	$(BIN)/python -m trainer.generate runs/demo "    def __init__(self" --temperature 0.5
	$(BIN)/python -m trainer.report runs/demo

# Tests of commands and of SLURM jobs, which stop and kill runs at given steps, have the machine for themselves.
ALONE := tests/integration tests/slurm
TESTS := $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile tests $(ALONE:%=--ignore=%)

test: check
	$(TESTS) -m "not slow"
	$(BIN)/python -m pytest -m "not slow" $(ALONE)

test-all: check
	$(TESTS)
	$(BIN)/python -m pytest $(ALONE)

# The tests that need a GPU, and those of the kernels on it: one GPU, some minutes.
test-gpu: $(INSTALLED)
	$(BIN)/python -m pytest -s tests/gpu tests/unit/moe/kernels

# Which faults do the tests notice? Some hours on two cores; the result is in docs/testing.md.
mutants: .venv/installed
	$(BIN)/python tests/mutants/mutants.py

# Speed compared with transformers, DeepSpeed AutoEP and deepspeed.moe: half an hour on an idle machine.
# AutoEP needs an older version of transformers, which is installed in build/.
bench: .venv/installed
	test -d build/transformers-5.22 || $(BIN)/python -m pip install --quiet --no-deps \
		--target build/transformers-5.22 'transformers==5.22.*'
	$(BIN)/python tests/bench/bench.py

# Speed of the layers of Qwen3-30B-A3B: one GPU, four minutes.
bench-gpu: $(INSTALLED)
	$(BIN)/python tests/bench/gpu.py

# Style and types, without tests.
check: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Install torch first: with an exact version, pip chooses the CPU build if the registry has one.
.venv/installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet -e '.[test]'
	touch $@

# megablocks pins an older torch, hence --no-deps. Its CUDA extension is left out because nvcc 13 cannot
# compile it: moe/experts_optional.py sorts and counts with torch instead. TORCH_CUDA_ARCH_LIST is set only so
# that setup.py does not look for a GPU.
megablocks: .venv/installed
	$(BIN)/python -m pip install --quiet triton 'setuptools>=70.1'
	TORCH_CUDA_ARCH_LIST=9.0 $(BIN)/python -m pip download --quiet --no-deps --no-build-isolation \
		--no-binary :all: --dest build megablocks==0.10.0
	tar -xzf build/megablocks-0.10.0.tar.gz -C build
	sed -i "s/^if 'cu' in/if False and 'cu' in/" build/megablocks-0.10.0/setup.py
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation stanford-stk==0.7.1 ./build/megablocks-0.10.0

clean:
	rm -rf .venv runs data build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
