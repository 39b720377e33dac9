# Everything here sets itself up from nothing but Python >= 3.11 and make.
#
#   make help     this page
#   make demo     installs what it needs and does the main job on real data
#   make test     a few cases of each kind of test, in some minutes
#   make test-all the whole test suite
#   make check    linter, formatter, strict types, and the workflow files against their schema
#   make sweep    the whole table of replicas x devices x collectives x types x control flow (long)
#   make table    the table collective x context, run and printed
#   make bench    the benchmarks, as ratios to their limits (ten minutes; QUICK=1: four; PAGE=1: and into docs/benchmarks.md)
#   make fuzz     random programs against the oracles, for MINUTES=10, from SEED=(a random one)
#   make clients  packages from PyPI that use jax.pmap, on JAX's own and on replicax (an environment of their own)
#
# PYTHON, VENV and JAX choose the interpreter, the environment and the release of JAX, as in
#   make test PYTHON=python3.13 VENV=.venv-new JAX='jax==0.12.0'

PYTHON ?= python3
VENV ?= .venv
JAX ?= jax
PYTEST_ARGS ?= -n 2 --dist loadgroup
CLIENTS ?=
QUICK ?=
PAGE ?=
BENCH_ARGS ?=
MINUTES ?= 10
SEED ?=

BIN = $(VENV)/bin
STAMP = $(VENV)/installed

.PHONY: help demo test test-all check sweep table bench fuzz clients clean

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

demo: $(STAMP)
	$(BIN)/python demo/demo.py

test: $(STAMP)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-all: $(STAMP)
	$(BIN)/python -m pytest $(PYTEST_ARGS) -m "long or not long"

sweep: $(STAMP)
	REPLICAX_SWEEP=full $(BIN)/python -m pytest $(PYTEST_ARGS) -m "long or not long" tests/test_sweep.py tests/test_transforms.py tests/test_placement.py

table: $(STAMP)
	$(BIN)/python tests/table.py

bench: $(VENV)-bench/installed
	$(VENV)-bench/bin/python benchmarks/run.py $(BENCH_ARGS) \
	    $(if $(QUICK),--quick --json benchmarks/results-quick.json) $(if $(PAGE),--page docs/benchmarks.md)
	$(if $(QUICK),,$(VENV)-bench/bin/python benchmarks/plot.py benchmarks/results.json docs/benchmarks.png)

fuzz: $(STAMP)
	$(BIN)/python tests/fuzz.py --minutes $(MINUTES) $(if $(SEED),--seed $(SEED))

clients: $(VENV)-clients/installed
	$(VENV)-clients/bin/python clients/run.py $(CLIENTS)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-forms .github/ISSUE_TEMPLATE/*.yml

$(STAMP): pyproject.toml Makefile
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "replicax needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade '$(JAX)' -e '.[test,check,clients]'
	touch $(STAMP)

$(VENV)-clients/installed: pyproject.toml Makefile clients/requirements.txt
	$(PYTHON) -m venv $(VENV)-clients
	$(VENV)-clients/bin/python -m pip install --quiet --upgrade '$(JAX)' -r clients/requirements.txt -e .
	touch $@

$(VENV)-bench/installed: pyproject.toml Makefile benchmarks/requirements.txt
	$(PYTHON) -m venv $(VENV)-bench
	$(VENV)-bench/bin/python -m pip install --quiet --upgrade '$(JAX)' -r benchmarks/requirements.txt -e .
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-clients $(VENV)-bench .mypy_cache .pytest_cache .ruff_cache
