# make demo    installs into .venv and shows the method on an embedded 8-megapixel photograph
# make test    the same for linters, types and the fast tests; WORKERS=8: on eight cores
# make test-all  the same with the slow tests
# make test-gpu  the tests that need a GPU
# make sanitize  the tests of the compiled kernels under AddressSanitizer and UndefinedBehaviorSanitizer
# make parity  rewrites tests/data/parity with what mmsegmentation computes, in an environment of its own (.venv-mmseg);
#              the test-suite compares with those files and needs none of it
# CONSTRAINTS=FILE  other pinned versions, e.g. of torch;  PYTHON=python3.12  another interpreter

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
MMENGINE_FILE = tests/data/parity/mmengine.pth

.PHONY: demo test test-all test-gpu sanitize parity lint clean

demo: $(VENV)/.installed
	$(VENV)/bin/sparserefine demo --out demo/

test: lint
	$(PARALLEL) -m "not gpu and not slow"

test-all: lint
	$(PARALLEL) -m "not gpu"

test-gpu: $(VENV)/.installed-dev
	$(VENV)/bin/python -m pytest -m gpu

sanitize: $(VENV)/.installed-dev
	$(VENV)/bin/python tests/sanitize.py

parity: $(VENV_MMSEG)/.installed
	$(VENV_MMSEG)/bin/python -W ignore tests/parity/reference.py
	test -e $(MMENGINE_FILE) || $(VENV_MMSEG)/bin/python -W ignore tests/parity/checkpoint.py $(MMENGINE_FILE)

$(VENV_MMSEG)/.installed:
	$(PYTHON) -m venv $(VENV_MMSEG)
	$(VENV_MMSEG)/bin/python -m pip --disable-pip-version-check install --constraint $(CONSTRAINTS) "setuptools<81" torch \
		mmengine==0.10.7 mmcv-lite==2.1.0 mmsegmentation==1.2.2 ftfy regex
	touch $@

lint: $(VENV)/.installed-dev
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

clean:
	rm -rf $(VENV) demo build dist
