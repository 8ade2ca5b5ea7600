# make demo   compare six methods with single-task models on the built-in digits
# make test   style, types, tests and the examples in the documentation (in two processes, or WORKERS=8)
# make test-all   the same with the slow tests: clusters, launchers, kills of real processes
# make test-cuda   the tests of steps, methods, engines and runs that want a GPU
# make docs   the generated pages, then the documentation site in site/, which opens without a server
# make coverage   how much of the core's lines the tests run (those for CUDA apart)
# make lock   the exact versions and hashes of all that continuous integration installs, in constraints-hashed.txt
# make audit   known weaknesses of these, and their list (SBOM) in dist/sbom.json; needs a network
#
# All set up their own environment in .venv first, once: it needs Python 3.11 or newer (or PYTHON=path/to/python).

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.ONESHELL:
.PHONY: help setup demo test test-all test-cuda docs coverage lock audit clean

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.set-up
DEMO_OUT ?= runs/demo
WORKERS ?= 2

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | head -10

setup: $(STAMP)

# The stamp is written last, so an interrupted set-up is done again.
$(STAMP): pyproject.toml constraints.txt
	@python=
	for candidate in $${PYTHON:-} python3 python3.14 python3.13 python3.12 python3.11; do
	    if command -v "$$candidate" > /dev/null && \
	        "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null; then
	        python=$$candidate
	        break
	    fi
	done
	if [ -z "$$python" ]; then
	    echo "Python 3.11 or newer is needed. Install it, or say where it is: make $(MAKECMDGOALS) PYTHON=/path/to/python" >&2
	    exit 1
	fi
	if [ ! -x $(BIN)/python ]; then "$$python" -m venv $(VENV); fi
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	# What is never imported needn't be compiled.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e '.[dev]'
	touch $@

demo: $(STAMP)
	@$(BIN)/torchmto compare --device cpu --out $(DEMO_OUT)

test: CHOSEN := -m "not slow"
test test-all: $(STAMP)
	@$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) --no-loadscope-reorder $(CHOSEN)

test-cuda: $(STAMP)
	@OMP_NUM_THREADS=1 CUBLAS_WORKSPACE_CONFIG=:4096:8 $(BIN)/pytest -n $(WORKERS) --no-loadscope-reorder -m "not slow" \
	    --device cuda tests/battery tests/engine tests/step tests/structure
	CUBLAS_WORKSPACE_CONFIG=:4096:8 $(BIN)/pytest --device auto tests/lab/run/test_trainer.py -k gpu

docs: export NO_MKDOCS_2_WARNING := 1
docs: $(STAMP)
	@$(BIN)/python docs/generate.py
	$(BIN)/mkdocs --quiet build --clean
	echo "Open site/index.html"

coverage: $(STAMP)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt coverage
	OMP_NUM_THREADS=1 $(BIN)/coverage run -m pytest -m "not slow" tests/battery tests/distributed tests/engine tests/fuzz \
	    tests/methods tests/solvers tests/step tests/structure tests/test_delta_m.py
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

# Without torch, whose builds differ (CPU, CUDA): `make setup` installs the one that constraints.txt names.
lock: $(STAMP)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt uv
	$(BIN)/uv pip compile --quiet pyproject.toml --extra dev -c constraints.txt --generate-hashes --no-annotate \
	    --python-platform x86_64-manylinux_2_28 --python-version 3.11.9 --no-emit-package torch \
	    --custom-compile-command "make lock" --output-file constraints-hashed.txt

# Strict: what the service doesn't know, or can't be asked about, is a failure.
audit: $(STAMP)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt cyclonedx-bom pip-audit
	mkdir -p dist
	{ grep '^torch==' constraints.txt; sed -n 's/^\([a-zA-Z0-9].*==[^ ]*\).*/\1/p' constraints-hashed.txt; } > dist/locked.txt
	$(BIN)/cyclonedx-py requirements dist/locked.txt --pyproject pyproject.toml --output-file dist/sbom.json
	$(BIN)/pip-audit -r dist/locked.txt --no-deps --disable-pip --strict

clean:
	@rm -rf $(VENV) runs dist build site .mypy_cache .ruff_cache .pytest_cache .hypothesis
