# The same commands for a person and for CI. Nothing is assumed but make and a Python that can `-m venv`;
# for another interpreter: make PYTHON=python3.12 ...
PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=
FUZZ_ARGS ?= --jobs 2
MATRIX_ARGS ?=
# One process a core, each with one thread: the networks of the tests are too small to share.
PYTEST := OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest --numprocesses auto --maxprocesses 8

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
QUICKSTART_EXTRAS := plots,progress
DEV_EXTRAS := all,dev

# `make quickstart` installs less than the tests need, but takes the full environment where there is one.
RUN_STAMP := $(if $(wildcard $(VENV)/.dev),$(VENV)/.dev,$(VENV)/.quickstart)

.PHONY: help venv test slow fuzz coverage lint types arrows wheel docs check matrix format quickstart bench clean

help:
	@echo "make quickstart  make data, train on it offline with SAC, CQL and Cal-QL, fine-tune online, draw the figure"
	@echo "make test        the default test suite"
	@echo "make slow        the tests that train for minutes"
	@echo "make fuzz        10,000 hostile files for each reader, minutes; FUZZ_ARGS=\"npz --cases 500\" for less"
	@echo "make check       format, lint, types, import arrows, the wheel, the documentation, then the tests"
	@echo "make docs        the documentation, in site/; any warning is an error"
	@echo "make format      rewrite the code as the format check wants it"
	@echo "make coverage    the default suite with branch coverage"
	@echo "make bench       the speed measurements of benchmarks/"
	@echo "make matrix      the suite on the lowest and highest versions allowed, and with each extra alone; takes hours"
	@echo "make venv        the environment alone, in $(VENV)"
	@echo "make clean       remove what the other targets made, the environment too"

venv: $(VENV)/.dev

# pip's own message about requires-python is hard to read.
$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "cql-plugins needs Python 3.11 or newer; choose one with: make PYTHON=python3.11 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# torch goes first and alone: a build of it that is already at hand (a CPU wheel, say) then satisfies all the rest,
# instead of pip choosing between builds in the middle of a larger resolution.
$(VENV)/.torch: constraints.txt $(VENV)/bin/python
	$(PIP) install --quiet --upgrade pip
	$(PIP) install --constraint constraints.txt torch
	@touch $@

# The stamps keep a second `make` from asking pip again until the pins or the dependencies change.
$(VENV)/.quickstart: $(VENV)/.torch pyproject.toml
	$(PIP) install --quiet --constraint constraints.txt --editable ".[$(QUICKSTART_EXTRAS)]"
	@touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	$(PIP) install --quiet --constraint constraints.txt --editable ".[$(DEV_EXTRAS)]"
	@touch $@

$(VENV)/.docs: $(VENV)/.torch pyproject.toml
	$(PIP) install --quiet --constraint constraints.txt --editable ".[docs]"
	@touch $@

test: venv
	$(PYTEST) $(PYTEST_ARGS)

slow: venv
	$(PYTEST) -m slow $(PYTEST_ARGS)

fuzz: venv
	$(BIN)/python tests/fuzz_readers.py $(FUZZ_ARGS)

coverage: venv
	$(PYTEST) --cov --cov-report=term-missing $(PYTEST_ARGS)

format: venv
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

lint: venv
	$(BIN)/ruff format --check
	$(BIN)/ruff check

types: venv
	$(BIN)/mypy

arrows: venv
	$(BIN)/lint-imports

# The wheel is built from the source archive, as an installer would build it: no link, no checkout, only the mapping.
wheel: venv
	rm -rf dist
	$(BIN)/python -m build --no-isolation --outdir dist .
	$(BIN)/python tests/check_wheel.py dist/*.whl

# The variable silences the theme's advertisement of its successor.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

check: lint types arrows wheel docs test

# Environments of its own, in .matrix; a second call goes on where the first was cut off.
matrix: $(VENV)/bin/python
	$(BIN)/python tests/matrix.py $(MATRIX_ARGS)

quickstart: $(RUN_STAMP)
	$(BIN)/python examples/quickstart.py

bench: venv
	@set -e; for script in benchmarks/bench_*.py; do echo "== $$script"; $(BIN)/python "$$script"; done

clean:
	rm -rf $(VENV) .matrix build dist site *.egg-info .coverage htmlcov .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
