# Needs python >= 3.11 and make; everything else is installed into .venv, in the versions of requirements/.
#   make run ARGS="partition=dirichlet partition.alpha=0.3"      make test      make lint      make docs      make clean

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp
RUN_STAMP := $(VENV)/.run-stamp
ARGS ?=

.PHONY: run test check test-docker lint docs clean
.DEFAULT_GOAL := run

run: $(RUN_STAMP)
	$(BIN)/fedmutual run $(ARGS)

test: lint
	$(BIN)/python -m pytest

# The daily round: lint, types, and the tests that start no federation and no process.
check: lint
	$(BIN)/python -m pytest -m "not slow and not federation"

# Needs a Docker engine with compose; builds the image, which takes several GB. TORCH_INDEX: see docker/Dockerfile.
test-docker: $(STAMP)
	$(BIN)/python -m pytest tests/docker -n 0 --timeout=5400 -s

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy fedmutual

# The documentation, into site/; a warning is an error. While writing: .venv/bin/mkdocs serve
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Installed anew when the lists change; an interrupted installation leaves no stamp and is repeated.
$(STAMP): requirements/dev.txt pyproject.toml
	$(call install,dev)
	touch $(RUN_STAMP) $@

# What running needs, and no more.
$(RUN_STAMP): requirements/run.txt pyproject.toml
	$(call install,run)
	touch $@

define install
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "fedmutual needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1)." >&2; \
	  echo "Name another one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	requirements/install.sh $(VENV) $(1)
endef

clean:
	rm -rf $(VENV) site .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
