# make run    the proof of concept on the bundled documents, or on yours: make run DOCUMENTS=folder (first time: installs into .venv)
# make test   style, types and the everyday tests (first time: installs into .venv-test, with CPU PyTorch)
# make check  style and types alone
# make bench  the figures of docs/performance.md
# make clean  both environments and everything built

PYTHON ?= python3
TORCH ?= torch==2.13.0
SOURCES := $(shell find anchorkv -type f -not -name '*.pyc')
DOCUMENTS ?=
MINUTES ?= 4
# llama.cpp's parts for pictures are not used, and take a quarter of the time to compile.
export CMAKE_ARGS ?= -DLLAVA_BUILD=OFF
PIP := -m pip --disable-pip-version-check -qq

.PHONY: run test check bench clean environment

run: .venv/.ready
	.venv/bin/anchorkv poc $(DOCUMENTS) --budget-minutes $(MINUTES)

test: check
	.venv-test/bin/python -m pytest -m "not slow"

check: .venv-test/.ready
	.venv-test/bin/ruff check .
	.venv-test/bin/mypy

bench: .venv-test/.ready
	.venv-test/bin/python benchmarks/inference.py

# What CI needs to run more tests than `make test` does.
environment: .venv-test/.ready

.venv/.dependencies: pyproject.toml
	@echo "Installing into .venv (once; llama.cpp is compiled where there is no wheel for it) ..."
	@$(PYTHON) -m venv .venv
	@.venv/bin/python $(PIP) install '.[poc]'
	@touch $@

.venv/.ready: .venv/.dependencies $(SOURCES)
	@.venv/bin/python $(PIP) install --no-deps --force-reinstall .
	@touch $@

.venv-test/.ready: pyproject.toml
	@echo "Installing into .venv-test (once) ..."
	@$(PYTHON) -m venv .venv-test
	@.venv-test/bin/python $(PIP) install $(TORCH)
	@.venv-test/bin/python $(PIP) install -e '.[torch,train,eval,dev]'
	@touch $@

clean:
	rm -rf .venv .venv-test build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
