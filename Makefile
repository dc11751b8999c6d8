# SPDX-License-Identifier: Apache-2.0
# A thin wrapper around pip, build and pytest. CONTRIBUTING.md says how to do without it.

VENV ?= .venv
PYTHON ?= python3
TORCH ?= torch
JOBS ?= $(shell nproc)

export CMAKE_BUILD_PARALLEL_LEVEL = $(JOBS)

BIN = $(VENV)/bin
WHEEL = $(VENV)/wheel
SOURCES = CMakeLists.txt pyproject.toml README.md \
  $(shell find cmake csrc python -type f -not -path '*/__pycache__/*')
CXX_SOURCES = $(shell find csrc -name '*.h' -o -name '*.c*')

.PHONY: bench demo test lint format clean

demo: $(VENV)/.demo
	$(BIN)/sparse-attn demo

bench: $(VENV)/.bench
	$(BIN)/python -m benchmarks

test: $(VENV)/.test lint
	$(BIN)/pytest

lint: | $(VENV)/.test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES)
	$(BIN)/mypy

format: | $(VENV)/.test
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CXX_SOURCES)

clean:
	rm -rf $(VENV) build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# The wheel is built from the sdist, once per change of the sources.
$(WHEEL)/.built: $(SOURCES) | $(BIN)/python
	$(BIN)/pip install --quiet build
	rm -rf $(WHEEL)
	$(BIN)/python cmake/build_wheel.py $(WHEEL)
	touch $@

# The installed wheel, with what `make bench`, `make demo` or `make test` needs: an extra.
$(VENV)/.bench: EXTRA = bench
$(VENV)/.demo: EXTRA = all
$(VENV)/.test: EXTRA = test
$(VENV)/.bench $(VENV)/.demo $(VENV)/.test: $(WHEEL)/.built
	$(BIN)/pip uninstall --quiet --yes sparse-attn
	$(BIN)/pip install --quiet '$(TORCH)' "$$(ls $(WHEEL)/*.whl)[$(EXTRA)]"
	touch $@
