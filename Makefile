# From a fresh clone, only make and a Python >= 3.11 are needed:  make quickstart
# Everything is installed into .venv from hash-locked requirements; nothing outside this folder is changed.
# (The quickstart's downloads and features go to $BEHOLDER_CACHE, else ~/.cache/beholder.)

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
VENV := .venv
BIN := $(VENV)/bin
# Which Python makes the environment, e.g.  make test PYTHON=python3.12
PYTHON ?=
CANDIDATES := $(or $(PYTHON),python3 python3.13 python3.12 python3.11 python)
# Extra arguments, e.g.  make quickstart ARGS="--out outputs/mine"   make test ARGS="-k packing"
ARGS ?=
UV_PIP := VIRTUAL_ENV="$(CURDIR)/$(VENV)" UV_PYTHON_DOWNLOADS=never $(BIN)/uv pip
COMPILE := $(UV_PIP) compile --universal --python-version 3.11 --generate-hashes --no-annotate --no-header --quiet $(UPGRADE)
UPGRADE ?=
# What the tests' environment is made from.
DEV_LOCK := requirements-dev.lock
# The other Pythons that the package is declared for.
PYTHONS ?= python3.12 python3.13

.PHONY: help
help: ## This list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | awk -F '\t' '{printf "  make %-12s %s\n", $$1, $$2}'

.PHONY: quickstart
quickstart: $(VENV)/.run ## Train a connector between a real LLM and a real vision tower, and show the evidence (minutes)
	$(BIN)/beholder quickstart $(ARGS)

# A worker per core, up to four (tests/conftest.py counts them); ARGS="-n 0" is one process, for a debugger. Each worker
# begins with an unbroken stretch of the tests and, when it is through, steals the far half of what another has left. So
# the cores stay busy to the end, whatever single tests weigh, and neighbours mostly stay together: few fixtures are built
# twice. Whole files (loadfile) would leave a core idle behind the heaviest one; single tests (load) would build every
# fixture on every worker.
.PHONY: test
test: $(VENV)/.dev ## The tests that need neither a GPU nor much time, on up to four cores
	$(BIN)/python -m pytest -m "not slow and not gpu" -n auto --dist worksteal $(ARGS)

.PHONY: test-slow
test-slow: $(VENV)/.dev .venv-docs/.docs ## The long tests (crash and resume at random instants, real downloads, …)
	$(BIN)/python -m pytest -m "slow and not gpu" $(ARGS)

.PHONY: test-gpu
test-gpu: $(VENV)/.dev ## The tests that need a GPU
	$(BIN)/python -m pytest -m "gpu" $(ARGS)

# An environment for each Python, beside .venv. A warning of a library that its next version has mended is no failure.
FLOOR = $(MAKE) test DEV_LOCK=requirements-floor.lock VENV=.venv-floor$(1) \
  ARGS="-W ignore::DeprecationWarning -W ignore::PendingDeprecationWarning -W ignore::FutureWarning $(ARGS)"
.PHONY: test-floor
test-floor: ## The same tests on the lowest versions that pyproject.toml declares (PYTHON= says on which Python)
	$(call FLOOR,$(addprefix -,$(notdir $(PYTHON))))

.PHONY: test-pythons
test-pythons: ## The same tests on Python 3.12 and 3.13, on the locked and on the lowest versions
	@for python in $(PYTHONS); do \
	  $(MAKE) test PYTHON=$$python VENV=.venv-$$(basename $$python); \
	  $(MAKE) test-floor PYTHON=$$python; \
	done

.PHONY: lint
lint: $(VENV)/.dev ## ruff, pyright, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

.PHONY: check
check: lint test ## Everything a change must pass: lint and test

.PHONY: format
format: $(VENV)/.dev ## Sort imports and format
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

# The pages are made with what they are about (.venv) and built in an environment of their own, so that neither needs
# the other's packages. (Not with --quiet: MkDocs then does not count its warnings, and strict means nothing.)
.PHONY: docs
docs: $(VENV)/.run .venv-docs/.docs ## The documentation as a site, in site/index.html; a broken link is an error
	$(BIN)/python -m docs.site.pages build/docs
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --config-file build/docs/mkdocs.yml
	@echo "site/index.html"

.PHONY: docs-serve
docs-serve: docs ## The same at http://127.0.0.1:8001
	$(BIN)/python -m http.server --bind 127.0.0.1 --directory site 8001

.PHONY: lock
lock: $(VENV)/.build ## Write the requirements*.lock files from pyproject.toml (make lock UPGRADE=--upgrade for newer versions)
	$(COMPILE) --group dev pyproject.toml -o requirements-dev.lock
	$(COMPILE) pyproject.toml -c requirements-dev.lock -o requirements.lock
	$(COMPILE) --group build -c requirements-dev.lock -o requirements-build.lock
	$(COMPILE) --group docs -o requirements-docs.lock
	$(COMPILE) --resolution lowest-direct --group dev --group build pyproject.toml -o requirements-floor.lock
	@! grep -nE '://|--(index|extra|find)' requirements*.lock || { echo "a lock file names a registry" >&2; exit 1; }

.PHONY: clean
clean: ## Remove the environment and build leftovers (runs in outputs/ and the cache stay)
	rm -rf $(VENV) .venv-* build dist site .pytest_cache .ruff_cache .hypothesis .import_linter_cache

# ---------------------------------------------------------------------------------------------------------------
# The environment. Each stamp is younger than what it was made from, so a second call does nothing.

# uv installs the locked requirements in seconds where pip takes minutes; pip only fetches uv and the build backend.
$(VENV)/.build: requirements-build.lock
	@py=""; for p in $(CANDIDATES); do \
	  if "$$p" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then py="$$p"; break; fi; \
	done; \
	if [ -z "$$py" ]; then \
	  echo "Beholder needs Python 3.11 or newer with the venv module; found no such thing among: $(CANDIDATES)" >&2; \
	  echo "Install one (Debian/Ubuntu: apt install python3.11 python3.11-venv), or name it: make quickstart PYTHON=/path/to/python3.12" >&2; \
	  exit 1; \
	fi; \
	if [ ! -x $(BIN)/python ]; then echo "[install] $$($$py --version) -> $(VENV)"; "$$py" -m venv $(VENV); fi
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements-build.lock
	@touch $@

# Byte code is compiled here, once. Many images set PYTHONDONTWRITEBYTECODE, and then Python would compile the hundreds
# of modules of transformers and timm anew at every start. pip compiles unasked. Python sees by its time that a source
# file has changed, and does not use what was compiled from the old one.
define install
@echo "[install] $(1)"
@$(UV_PIP) install --quiet --compile-bytecode --require-hashes -r $(1) || { \
  echo "[install] uv could not install $(1); trying pip, which takes some minutes" >&2; \
  $(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r $(1); }
@$(UV_PIP) install --quiet --no-deps --no-build-isolation -e .
@$(BIN)/python -m compileall -q src
endef

$(VENV)/.run: $(VENV)/.build requirements.lock pyproject.toml
	$(call install,requirements.lock)
	@touch $@

$(VENV)/.dev: $(VENV)/.build $(DEV_LOCK) pyproject.toml
	$(call install,$(DEV_LOCK))
	@touch $(VENV)/.run $@

.venv-docs/.docs: $(VENV)/.build requirements-docs.lock
	@echo "[install] requirements-docs.lock -> .venv-docs"
	@$(BIN)/python -m venv --clear --without-pip .venv-docs
	@VIRTUAL_ENV="$(CURDIR)/.venv-docs" UV_PYTHON_DOWNLOADS=never $(BIN)/uv pip install --quiet --require-hashes -r requirements-docs.lock
	@touch $@
