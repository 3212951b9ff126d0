# `make` alone prints the targets. On a machine with Python 3.11 or newer each of them sets up .venv first, once.

PYTHON ?= $(shell python3.11 -c "" 2>/dev/null && echo python3.11 || echo python3)
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# Pinned for the set-up alone; `pip install minirl` takes any from the lower bound in pyproject.toml.
TORCH := torch==2.13.0
GPU_TESTS ?= $(shell grep -lr '^from minirl.kernels' tests --include='test_*.py')

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-processors lint bench gpu clean

help:  ## print the targets
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' Makefile | expand -t 24

venv: $(INSTALLED)  ## set up .venv; does nothing when that is done

demo: $(INSTALLED)  ## watch a tiny model learn
	$(BIN)/minirl demo

test: lint  ## lint, then every test, on up to 8 cores
	$(BIN)/python -m pytest -n logical --maxprocesses 8 --dist worksteal

test-processors: $(INSTALLED)  ## the numeric tests with the instruction sets of other processors, about 10 minutes
	$(BIN)/python tests/processors.py

lint: $(INSTALLED)  ## ruff check and ruff format --check
	$(BIN)/ruff check
	$(BIN)/ruff format --check

bench: $(INSTALLED)  ## measure beside eager PyTorch, Liger, TRL, transformers; they come with pip install '.[peers]'
	$(BIN)/python -m bench

gpu:  ## on a machine with a GPU, in an environment that has torch (PYTHON=...): the kernels' tests, then make bench
	$(PYTHON) -m pytest -p bench.common $(GPU_TESTS); tested=$$?; $(PYTHON) -m bench && exit $$tested

clean:  ## remove .venv, build output and caches
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp holds the folder that was set up, because an environment that was copied or moved still points to its old one.
ifneq ($(shell cat $(INSTALLED) 2>/dev/null),$(CURDIR))
.PHONY: $(INSTALLED)
endif

# The stamp is written last, so a set-up that broke off is taken up again. torch comes first and is held in place by the
# constraint: a requirement of another package must not replace it with a second build.
$(INSTALLED): setup.py pyproject.toml
	@rm -f $@
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "minirl needs Python 3.11 or newer: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	echo '$(TORCH)' > $(VENV)/constraints.txt
	$(BIN)/python -m pip install '$(TORCH)'
	$(BIN)/python -m pip install -c $(VENV)/constraints.txt 'setuptools>=77'
	$(BIN)/python -m pip install -c $(VENV)/constraints.txt --no-build-isolation -e '.[dev]'
	@echo '$(CURDIR)' > $@
