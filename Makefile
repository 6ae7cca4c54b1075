# Every target sets itself up: on a fresh machine `make demo` or `make test` is all that is needed.

VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
DOCS   := $(VENV)/.docs
# The first of these that runs and is new enough; python3.11 first, constraints.txt was frozen with it.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$p && break; done)
# One thread a process: the tests run in parallel, and small tensors lose time to more threads.
WORKERS ?= 2
ONE     := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

# Real scans, where this machine has them; tests that need them say so and skip where it has not.
ifndef TUNEMRI_DATA
ifneq ($(wildcard ../shared/data/train),)
export TUNEMRI_DATA := $(abspath ../shared/data)
endif
endif

.DEFAULT_GOAL := help
.PHONY: help install browser demo test check format bench bench-paper docs clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(STAMP) ## create .venv with tunemri and everything needed to work on it

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "tunemri needs Python 3.11 or newer: make PYTHON=/path/to/python3.11 install" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[cluster,dev,viewer]'
	@touch $@

# The viewer's tests drive Debian's chromium. It is installed where it is missing and can be had; else they are skipped.
browser:
	@command -v chromium >/dev/null || { test "$$(id -u)" = 0 && command -v apt-get >/dev/null && \
		{ echo "installing chromium for the viewer's tests" >&2; \
		  timeout 60 apt-get -qq update && DEBIAN_FRONTEND=noninteractive timeout 240 apt-get -qq -y \
			--no-install-recommends install chromium fonts-dejavu-core; } >/dev/null; } || \
		echo "no chromium: the viewer's browser tests will be skipped" >&2

demo: $(STAMP) ## the embedded scan through the whole range of a dial, with a report to look at
	$(BIN)/tunemri demo -o demo --overwrite
	@echo "open $(abspath demo)/report.html"

test: $(STAMP) browser ## all tests (WORKERS=2 processes)
	$(ONE) $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal

check: $(STAMP) ## format, lint, types, import order
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(ONE) $(BIN)/python -m pytest -q tests/test_layers.py

format: $(STAMP) ## put the code into the form that check asks for
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(STAMP) ## classical solvers against BART, one thread each
	$(ONE) $(BIN)/python benchmarks/classical.py
	$(ONE) $(BIN)/python benchmarks/bake.py

# About 20 minutes on two cores; BUDGET=full trains networks too and takes hours. Goes on where it was stopped.
BUDGET ?= quick
bench-paper: $(STAMP) ## the papers' tables and the outside yardstick, as docs/report.md (BUDGET=quick or full)
	@test -n "$(TUNEMRI_DATA)" || { echo "no images: make bench-paper TUNEMRI_DATA=/path/to/data" >&2; exit 1; }
	$(ONE) $(BIN)/python benchmarks/paper.py --data $(TUNEMRI_DATA) -o runs/paper --budget $(BUDGET) \
		--jobs $(WORKERS) --page docs/report.md

docs: $(DOCS) ## the site, built strictly, its examples run: build/site/index.html
	$(ONE) NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --clean
	@echo "open $(abspath build/site)/index.html"

$(DOCS): $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	@touch $@

clean: ## remove what make made
	rm -rf $(VENV) build demo .pytest_cache .mypy_cache .ruff_cache .hypothesis
