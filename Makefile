# The commands of the README. Each works on a fresh clone: it makes .venv first.
# PIP_ARGS goes to every pip install, for example to ask for a CPU-only torch.
PYTHON ?= python3
PIP_ARGS ?=
PIP := .venv/bin/python -m pip install --disable-pip-version-check --quiet $(PIP_ARGS)

.PHONY: help serve test test-clients check format bench clean

help:  ## Show this help.
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

serve: .venv/.run  ## Serve the storyteller on http://127.0.0.1:8000.
	.venv/bin/kvik serve

# Who computes what, and where it lies, is decided in two files without torch. Their own tests take
# every branch of them, in seconds.
COVERAGE := .venv/bin/python -m coverage

test: .venv/.test  ## Run the tests; the policy's must take every branch of it.
	.venv/bin/python -m pytest $(PYTEST_ARGS)
	$(COVERAGE) run --include=engine/scheduler.py,engine/block_manager.py \
	    -m pytest -q tests/engine/test_scheduler*.py tests/engine/test_block_manager.py
	$(COVERAGE) report --show-missing --fail-under=100

test-clients: .venv/.clients  ## Test the server with other people's clients.
	.venv/bin/python -m pytest tests/clients $(PYTEST_ARGS)

check: .venv/.test  ## Check formatting, lint and types.
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy

format: .venv/.test  ## Format the code and mend what ruff can mend.
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .

bench: .venv/.run  ## Measure decoding on this machine.
	.venv/bin/kvik bench decode

clean:  ## Remove the virtual environment and every cache.
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis build *.egg-info

.venv/bin/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else f"Kvik needs Python 3.11 to 3.13; $(PYTHON) is {v[0]}.{v[1]}. Name another with: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv

.venv/.run: .venv/bin/python pyproject.toml
	$(PIP) -e '.[hub,train]'
	@touch $@

.venv/.test: .venv/.run
	$(PIP) -e '.[test]'
	@touch $@

.venv/.clients: .venv/.test
	$(PIP) -e '.[clients]'
	@touch $@
