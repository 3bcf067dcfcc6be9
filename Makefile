# `make demo` and `make test` do all set-up themselves; they need Python 3.11 or newer, and make.
PYTHON ?= python3
VENV ?= .venv
# One process more than cores (tests/conftest.py), and no more than four: all tests that use Ray are in one process.
IN_PARALLEL := --numprocesses auto --maxprocesses 4 --no-loadscope-reorder
# More at a time overload two cores: each starts a Ray, whose node ends where its agents take more than 15 s to start.
TWO_AT_A_TIME := --numprocesses 2 --no-loadscope-reorder
# A file, where coverage is to be measured.
COVERAGE ?=
INSTALLED := $(VENV)/.installed

.PHONY: demo test test-faults golden audit lint types docs clean

demo: $(INSTALLED)  ## run the whole pipeline on the embedded handwritten digits
	$(VENV)/bin/python jobs/full_pipeline.py

test: $(INSTALLED)  ## run all but the fault-injection tests; with coverage: make test COVERAGE=coverage.json
	$(VENV)/bin/python $(if $(COVERAGE),-m slipcover --json --out $(COVERAGE)) -m pytest $(IN_PARALLEL)
	$(if $(COVERAGE),$(VENV)/bin/python -m slipcover --merge $(COVERAGE) --out $(COVERAGE) --fail-under 95)

test-faults: $(INSTALLED)  ## run the fault-injection tests (several machines, soak): docs/fault_tolerance.md
	$(VENV)/bin/python -m pytest -m fault_injection $(TWO_AT_A_TIME)

golden: $(INSTALLED)  ## update the golden numbers, when results are meant to change (tests/golden.py)
	$(VENV)/bin/python tests/golden.py

audit: $(INSTALLED)  ## known vulnerabilities of the pinned dependencies
	$(VENV)/bin/pip install --quiet --constraint constraints.txt pip-audit
	$(VENV)/bin/pip-audit --requirement constraints.txt --no-deps --disable-pip --strict

lint: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(INSTALLED)
	$(VENV)/bin/mypy

docs: $(INSTALLED)  ## build the documentation into site/; fails on any warning
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict

# pip would compile all modules on one core. One that cannot be compiled is no error, as with pip.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "$(PYTHON) lacks its venv module: on Debian or Ubuntu, \
	sudo apt install python3-venv (python3.12-venv for a Python 3.12 that is not the default)" >&2; exit 1; }
	@echo "installing into $(VENV), which takes minutes: on Linux several GB with PyTorch's builds for CUDA; without a GPU \
	less than 3 GB on disk with PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu in the environment"
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --no-compile --constraint constraints.txt --editable '.[test]'
	$(VENV)/bin/python -m compileall -qq --workers 0 $(VENV)/lib || true
	touch $@

clean:
	rm -rf $(VENV)
