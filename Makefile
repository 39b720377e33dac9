# Everything here sets itself up from nothing but Python >= 3.11 and make.
#
#   make help     this page
#   make demo     installs what it needs and does the main job on real data
#   make test     a few cases of each kind of test (about six minutes on two idle cores)
#   make test-all the whole test suite
#   make test-long what test-all runs and test does not (PART=1/2: of large tables every other case; PART=2/2: the rest)
#   make check    linter, formatter, strict types, and the workflow files against their schema
#   make sweep    the whole table of replicas x devices x collectives x types x control flow (long)
#   make table    the table collective x context, run and printed
#   make bench    the benchmarks, as ratios to their limits (ten minutes; QUICK=1: four; PAGE=1: and into docs/benchmarks.md)
#   make fuzz     random programs against the oracles, for MINUTES=10, from SEED=(a random one); PROCESSES=2: over that
#                 many processes, with 4 devices each, or as in DEVICES='3 1'; LANES=sequential or LANES=3: with these lanes
#   make clients  packages from PyPI that use jax.pmap, on JAX's own and on replicax (an environment of their own)
#   make dist     the source distribution and the wheel, in dist/
#   make lock     writes the newest versions of all that the environment installs to requirements/*.txt
#
# PYTHON, VENV and JAX choose the interpreter, the environment and the release of JAX, as in
#   make test PYTHON=python3.13 VENV=.venv-new JAX='jax==0.12.0'
#
# For test, test-all, test-long and check:
#   WHEEL=1        installs the built wheel, and not the sources in place
#   LOCKED=newest  installs the versions in requirements/newest.txt; LOCKED=oldest is for Python 3.11 with JAX 0.10.2
#   REPLICAX_TEST_DEVICES=real  runs the tests on the devices of this machine, such as a GPU (for test)
#   COVERAGE=1     measures the coverage, and fails below the floor in pyproject.toml (for test and test-all)

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
PROCESSES ?=
DEVICES ?=
LANES ?=
PART ?=
WHEEL ?=
LOCKED ?=
COVERAGE ?=

BIN = $(VENV)/bin
STAMP = $(VENV)/installed$(if $(WHEEL),-wheel)$(if $(LOCKED),-$(LOCKED))
LOCK = $(if $(LOCKED),requirements/$(LOCKED).txt)
EXTRAS = [test,check,clients]
PACKAGE = $(if $(WHEEL),"$$(echo dist/*.whl)$(EXTRAS)",-e '.$(EXTRAS)')
INSTALLED = $$($(BIN)/python -c 'import importlib.util; print(*importlib.util.find_spec("replicax").submodule_search_locations)')

# Doctests are collected from the package under test. On Python 3.11, coverage has no sysmon, which is faster.
PYTEST = $(if $(COVERAGE),COVERAGE_CORE=$$($(BIN)/python -c 'import sys; print("sysmon" if sys.version_info >= (3, 12) else "ctrace")')) \
    $(BIN)/python -m pytest $(if $(WHEEL),-o testpaths="tests README.md docs $(INSTALLED)") $(if $(COVERAGE),--cov --cov-report=term) \
    $(PYTEST_ARGS)

.PHONY: help demo test test-all test-long check sweep table bench fuzz clients dist lock clean

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

demo: $(STAMP)
	$(BIN)/python demo/demo.py

test: $(STAMP)
	$(PYTEST)

test-all: $(STAMP)
	$(PYTEST) -m "long or not long"

test-long: $(STAMP)
	$(PYTEST) -m long $(if $(PART),--part $(PART))

sweep: $(STAMP)
	REPLICAX_SWEEP=full $(BIN)/python -m pytest $(PYTEST_ARGS) -m "long or not long" tests/test_sweep.py tests/test_transforms.py tests/test_placement.py

table: $(STAMP)
	$(BIN)/python tests/table.py

bench: $(VENV)-bench/installed
	$(VENV)-bench/bin/python benchmarks/run.py $(BENCH_ARGS) \
	    $(if $(QUICK),--quick --json benchmarks/results-quick.json) $(if $(PAGE),--page docs/benchmarks.md)
	$(if $(QUICK),,$(VENV)-bench/bin/python benchmarks/plot.py benchmarks/results.json docs/benchmarks.png)

fuzz: $(STAMP)
	$(if $(LANES),REPLICAX_FUZZ_LANES=$(LANES)) \
	    $(BIN)/python tests/$(if $(PROCESSES)$(DEVICES),fuzz_processes,fuzz).py --minutes $(MINUTES) $(if $(SEED),--seed $(SEED)) \
	    $(if $(PROCESSES),--processes $(PROCESSES)) $(if $(DEVICES),--devices $(DEVICES))

clients: $(VENV)-clients/installed
	$(VENV)-clients/bin/python clients/run.py $(CLIENTS)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-forms .github/ISSUE_TEMPLATE/*.yml

# pip keeps an installed wheel of the same version, so the package is uninstalled first. With --no-index, pip fails if the
# lock file lacks a package.
$(STAMP): pyproject.toml Makefile $(LOCK) $(if $(LOCKED),requirements/build.in) $(if $(WHEEL),dist/built)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "replicax needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	rm -f $(VENV)/installed*
	$(BIN)/python -m pip uninstall --quiet --yes replicax
ifdef LOCKED
	$(BIN)/python -m pip install --quiet --require-hashes -r $(LOCK)
	$(BIN)/python -m pip install --quiet --no-index --no-build-isolation $(PACKAGE)
else
	$(BIN)/python -m pip install --quiet --upgrade '$(JAX)' $(PACKAGE)
endif
ifdef WHEEL
	diff -r -x __pycache__ src/replicax "$(INSTALLED)"
	diff -r -x __pycache__ src/replicax_cli "$(INSTALLED)_cli"
endif
	touch $(STAMP)

dist: dist/built

# The wheel is built from the source distribution, so both are complete.
dist/built: pyproject.toml README.md LICENSE requirements/build.in $(shell find src -type f ! -name '*.pyc')
	$(PYTHON) -m venv $(VENV)-dist
	$(VENV)-dist/bin/python -m pip install --quiet --upgrade $(if $(LOCKED),--require-hashes -r requirements/build.txt,-r requirements/build.in)
	rm -rf dist
	$(VENV)-dist/bin/python -m build --no-isolation
	touch $@

COMPILE = $(VENV)-lock/bin/uv pip compile --quiet --upgrade --generate-hashes --no-annotate --custom-compile-command 'make lock'
COMPILE_ALL = $(COMPILE) pyproject.toml requirements/build.in --extra test --extra check --extra clients

# uv does not read pip's configuration: with a mirror of PyPI, set UV_DEFAULT_INDEX. The result does not contain it.
lock:
	$(PYTHON) -m venv $(VENV)-lock
	$(VENV)-lock/bin/python -m pip install --quiet --upgrade uv
	$(COMPILE) requirements/build.in --python-version 3.11 --universal -o requirements/build.txt
	echo jax==0.10.2 | $(COMPILE_ALL) --constraint - --python-version 3.11 -o requirements/oldest.txt
	$(COMPILE_ALL) --python-version 3.12 --universal -o requirements/newest.txt
	! grep -nE '://|@ |^-' requirements/*.txt  # names, versions and hashes, but no address and no path

$(VENV)-clients/installed: pyproject.toml Makefile clients/requirements.txt
	$(PYTHON) -m venv $(VENV)-clients
	$(VENV)-clients/bin/python -m pip install --quiet --upgrade '$(JAX)' -r clients/requirements.txt -e .
	touch $@

$(VENV)-bench/installed: pyproject.toml Makefile benchmarks/requirements.txt
	$(PYTHON) -m venv $(VENV)-bench
	$(VENV)-bench/bin/python -m pip install --quiet --upgrade '$(JAX)' -r benchmarks/requirements.txt -e .
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-clients $(VENV)-bench $(VENV)-dist $(VENV)-lock dist .coverage .mypy_cache .pytest_cache .ruff_cache
