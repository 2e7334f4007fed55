# `make help` lists the targets: the text after ## of each.
# Variables: CONSTRAINTS=FILE  other pinned versions, e.g. of torch;  PYTHON=python3.12  another interpreter;
#            VENV=FOLDER  another environment;  WORKERS=N  processes of the test-suite;
#            SECONDS=N  time for chaos and fuzz;  SEED=N, ONLY=NAME  other attacks, or one again

PYTHON ?= python3
VENV ?= .venv
VENV_MMSEG ?= .venv-mmseg
# For the tests of GPU kernels without a GPU. The CPU build of torch comes without; a build for GPUs brings its own.
TRITON ?= 3.9.0
CONSTRAINTS ?= constraints.txt
NATIVE = src/sparserefine/engines/cpu/native
KERNELS = hatch_build.py $(NATIVE)/build.py $(wildcard $(NATIVE)/*.h $(NATIVE)/*.cpp)
PIP = $(VENV)/bin/python -m pip --disable-pip-version-check install --constraint $(CONSTRAINTS)
# Tests of one group (tests/conftest.py) run in one worker, so that what they share is made once.
WORKERS ?= 2
PARALLEL = $(VENV)/bin/python -m pytest -n $(WORKERS) --dist loadgroup
ATTACK = PYTHONPATH=tests $(VENV)/bin/python -m
SECONDS ?= 60
SEED ?= 0
ONLY ?=
MMENGINE_FILE = tests/data/parity/mmengine.pth

.DEFAULT_GOAL := help
.PHONY: help dev demo test test-all test-gpu sanitize chaos fuzz wheels parity lint clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

dev: $(VENV)/.installed-dev ## installs into .venv what the other targets use: the package, editable, and all tools

demo: $(VENV)/.installed ## shows the method on an embedded 8-megapixel photograph; pictures in demo/
	$(VENV)/bin/sparserefine demo --out demo/

test: lint ## linters, types and the fast tests
	$(PARALLEL) -m "not gpu and not slow"

test-all: lint ## the same with the slow tests
	$(PARALLEL) -m "not gpu"

test-gpu: $(VENV)/.installed-dev ## the tests that need a CUDA device
	$(VENV)/bin/python -m pytest -m gpu

sanitize: $(VENV)/.installed-dev ## the tests of the compiled kernels under AddressSanitizer and UndefinedBehaviorSanitizer
	$(VENV)/bin/python tests/sanitize.py

chaos: $(VENV)/.installed-dev ## kills commands at each rename, fills their disk, starts two at once; SECONDS=0: everywhere
	$(ATTACK) chaos.kills --seconds $(SECONDS) --seed $(SEED) --only "$(ONLY)"

fuzz: $(VENV)/.installed-dev ## gives bad images, weights and configurations to what reads them
	$(ATTACK) chaos.fuzz --seconds $(SECONDS) --seed $(SEED) --only "$(ONLY)"

wheels: $(VENV)/.installed-dev ## a manylinux and a pure wheel in dist/, each installed and run in an empty environment
	$(VENV)/bin/python tests/wheels.py dist $(CONSTRAINTS)

# The test-suite compares with these files and needs no mmsegmentation.
parity: $(VENV_MMSEG)/.installed ## rewrites tests/data/parity with what mmsegmentation computes, in .venv-mmseg
	$(VENV_MMSEG)/bin/python -W ignore tests/parity/reference.py
	test -e $(MMENGINE_FILE) || $(VENV_MMSEG)/bin/python -W ignore tests/parity/checkpoint.py $(MMENGINE_FILE)

$(VENV_MMSEG)/.installed:
	$(PYTHON) -m venv $(VENV_MMSEG)
	$(VENV_MMSEG)/bin/python -m pip --disable-pip-version-check install --constraint $(CONSTRAINTS) "setuptools<81" torch \
		mmengine==0.10.7 mmcv-lite==2.1.0 mmsegmentation==1.2.2 ftfy regex
	touch $@

lint: $(VENV)/.installed-dev ## ruff and mypy
	$(VENV)/bin/ruff format --check src tests examples benchmarks hatch_build.py
	$(VENV)/bin/ruff check src tests examples benchmarks hatch_build.py
	$(VENV)/bin/mypy

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml $(CONSTRAINTS) $(KERNELS) | $(VENV)/bin/python
	$(PIP) --editable .
	touch $@

$(VENV)/.installed-dev: pyproject.toml $(CONSTRAINTS) $(KERNELS) | $(VENV)/bin/python
	$(PIP) --editable '.[dev]'
	$(VENV)/bin/python -c 'import triton' 2>/dev/null || $(PIP) --no-deps triton==$(TRITON)
	touch $@ $(VENV)/.installed

clean: ## removes .venv, demo, build and dist
	rm -rf $(VENV) demo build dist
