# `make demo` and `make test` need nothing but Python 3.11 or newer and a package registry.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-all check clean

demo: .venv/installed
	$(BIN)/python -m data_pipeline experiment=demo
	$(BIN)/python -m trainer experiment=demo
	$(BIN)/python -m trainer.generate runs/demo "def "

test: check
	$(BIN)/python -m pytest -m "not slow" tests

test-all: check
	$(BIN)/python -m pytest tests

# The quick loop: style, types and the unit tests.
check: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# torch first: where a CPU build is offered for this exact version, it is taken.
.venv/installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet -e '.[test]'
	touch $@

clean:
	rm -rf .venv runs data build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
