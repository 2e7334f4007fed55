# make demo    installs into .venv and shows the method on an embedded 8-megapixel photograph
# make test    the same for linters, types and the test-suite
# make sanitize  the tests of the compiled kernels under AddressSanitizer and UndefinedBehaviorSanitizer
# CONSTRAINTS=FILE  other pinned versions, e.g. of torch;  PYTHON=python3.12  another interpreter

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
KERNELS = hatch_build.py src/sparserefine/native/build.py $(wildcard src/sparserefine/native/*.h src/sparserefine/native/*.cpp)
PIP = $(VENV)/bin/python -m pip --disable-pip-version-check install --constraint $(CONSTRAINTS)

.PHONY: demo test test-gpu sanitize lint clean

demo: $(VENV)/.installed
	$(VENV)/bin/sparserefine demo --out demo/

test: lint
	$(VENV)/bin/python -m pytest -m "not gpu"

test-gpu: $(VENV)/.installed-dev
	$(VENV)/bin/python -m pytest -m gpu

sanitize: $(VENV)/.installed-dev
	$(VENV)/bin/python tests/sanitize.py

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
	touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) demo build dist
