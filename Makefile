# Set-up happens once, in $(VENV), and again when a file that it depends on has changed.
VENV ?= .venv
PYTHON ?=
CANDIDATES := $(if $(PYTHON),$(PYTHON),python3 python3.13 python3.12 python3.11)
PY := $(VENV)/bin/python
STAMP := $(VENV)/.seda_fast_installed

export PIP_DISABLE_PIP_VERSION_CHECK = 1
export PIP_NO_INPUT = 1

.PHONY: help train test lint bench api clean

help:
	@echo "make train   set up, then train on the embedded digits; results in runs/digits"
	@echo "make test    set up, then ruff, mypy and the tests"
	@echo "make lint    set up, then ruff and mypy"
	@echo "make bench   set up, then the benchmarks that this machine can run"
	@echo "make api     set up, then write docs/api.md from the docstrings"
	@echo "make clean   remove .venv, caches and what builds leave behind; runs/ stays"
	@echo "PYTHON=/path/to/python3 chooses the interpreter, VENV=folder the environment."

train: $(STAMP)
	$(PY) -m seda_fast.train --data digits --out runs/digits --overwrite

# A core runs a test file after another, each on one thread: most tests wait for one, and two that share a core spin.
test: lint
	OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --maxprocesses 8 --dist worksteal

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m mypy --strict seda_fast

bench: $(STAMP)
	$(PY) -m pytest benchmarks --benchmark-only

api: $(STAMP)
	$(PY) docs/make_api.py

# What the libraries are made of; ninja makes anew only what has changed.
SOURCES := $(shell find csrc -type f -not -path '*/__pycache__/*')

# An environment without pip, as uv makes them, is given it; one that was left half made is made again.
# The lock file goes first: with its torch in place pip has no reason to fetch another.
$(STAMP): requirements.lock pyproject.toml setup.py $(SOURCES)
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PY) -m ensurepip >/dev/null 2>&1 || { \
	  for python in $(CANDIDATES); do \
	    if "$$python" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; \
	    then exec "$$python" -m venv $(VENV); fi; \
	  done; \
	  echo "seda_fast needs Python 3.11 or newer with its venv module, and none of these is one: $(CANDIDATES);" \
	    "name one with make PYTHON=/path/to/python3." >&2; exit 1; }
	@echo "Installing requirements.lock and seda_fast into $(VENV); the first time this downloads PyTorch."
	@$(PY) -m pip install --quiet -r requirements.lock
	@$(PY) -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	rm -f seda_fast/_C*.so seda_fast/libseda_fast_*.so seda_fast/_build.json
	find $(wildcard seda_fast kernels csrc tests benchmarks docs) -name __pycache__ -type d -prune -exec rm -rf {} +
