# Everything a user or CI needs. `make repro` and `make test` each work by themselves on a fresh clone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
export PATH := $(CURDIR)/$(BIN):$(PATH)
export DVC_NO_ANALYTICS = true
export MLFLOW_DISABLE_TELEMETRY = true

.PHONY: repro figures test lint soak brief gpu docs docs-settings lock clean help

help: ## Print this list.
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

$(BIN)/python:
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "ablate needs Python 3.11 or newer"'
	$(PYTHON) -m venv $(VENV)

# One stamp per set of requirements, so that a second call installs nothing.
$(VENV)/.installed: constraints.txt pyproject.toml | $(BIN)/python
	$(PIP) install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/.installed-dev: constraints.txt pyproject.toml | $(BIN)/python
	$(PIP) install --quiet --constraint constraints.txt --editable '.[hub,ray,qa,dev]'
	touch $@ $(VENV)/.installed

repro: $(VENV)/.installed ## Run the default pipeline: data, study, findings, report.
	$(BIN)/dvc repro

figures: $(VENV)/.installed ## Draw every published report from its stored tables (no training).
	$(BIN)/ablate figures

# Files in their own order: xdist would put those of few tests last, and the longest of all, the interpreter lane, is one.
test: lint ## Lint, type-check and run the fast tests (9 minutes on 2 cores).
	$(BIN)/python -m pytest -m "not soak and not soak_short" -n 2 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/.installed-dev ## Style and types.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

soak: $(VENV)/.installed-dev ## Long proofs (up to an hour).
	$(BIN)/python -m pytest -m soak --timeout 3600

brief: $(VENV)/.installed-dev ## Short cuts of the long proofs (10 minutes on 2 cores).
	ABLATE_KILLS=$${ABLATE_KILLS:-6} $(BIN)/python -m pytest -m soak_short -n 2 --dist load

gpu: ## Measure everything a GPU can tell, into build/gpu; needs CUDA PyTorch and Triton, installs nothing.
	$(PYTHON) -m ablate.bench.gpu build/gpu --minutes 9

docs: docs-settings ## Build the documentation into build/docs, without a network; a warning is an error.
	$(BIN)/python -m sphinx -q -W -d build/docs-trees docs build/docs

docs-settings: $(VENV)/.installed-dev ## Write the tables of settings in docs/studies.md from the code.
	$(BIN)/python -m tools.settings_page

lock: ## Write constraints.txt from the newest allowed versions.
	rm -rf $(VENV).lock && $(PYTHON) -m venv $(VENV).lock
	$(VENV).lock/bin/python -m pip install --quiet --editable '.[hub,ray,qa,dev]'
	{ echo '# Exact versions of everything; refreshed with `make lock`. Triton is left out: torch'"'"'s own pin decides it on a GPU machine.'; \
	  $(VENV).lock/bin/python -m pip freeze --exclude-editable | grep -v '^triton==' | sed 's/+cpu$$//'; } > constraints.txt
	rm -rf $(VENV).lock

clean: ## Remove the environment and caches; results and reports stay.
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache
