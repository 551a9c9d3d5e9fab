# Head-Bound: `make` alone explains the commands.
PRESET ?= laptop
PYTHON ?= python3.11
VENV   ?= .venv
CORES  ?= $(shell nproc 2>/dev/null || sysctl -n hw.ncpu)
PORT   ?= 8000
export HEADBOUND_URL ?=
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.headbound-installed

.DEFAULT_GOAL := help
.PHONY: help install book sign pdf linkcheck plan test screenshots bench lint serve lock clean

help:  ## these explanations
	@echo "Head-Bound, an executable companion to Godey et al. 2024. Commands:"
	@grep -E '^[a-z]+:.*##' Makefile | sed -E 's/^([a-z]+):.*## */  make \1\t/' | expand -t 18
	@echo "PRESET=smoke (minutes, for tests), laptop (the default), paper (the Hub and a GPU)."

$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' \
	  || { echo "headbound: $(PYTHON) is not Python 3.11; install it, or say PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock \
	  && $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e . \
	  || { echo "headbound: the installation failed (see above); check the network and run the command again"; exit 1; }
	@touch $@

install: $(STAMP)  ## the pinned environment in .venv (the other commands do this by themselves)

book: $(STAMP)  ## execute every chapter under PRESET and render the book into _build/html
	@$(BIN)/python -m companion.cli --preset $(PRESET) --cores $(CORES)

sign: $(STAMP)  ## accept the verdicts that PRESET's chapters now give; the diff of book/verdicts.yaml shows them
	@$(BIN)/python -m companion.results --preset $(PRESET)

pdf: book  ## the book as _build/head-bound.pdf, printed by Chromium
	@$(BIN)/python -m companion.pdf

linkcheck: book  ## do the links to other hosts still answer? needs the network
	@PATH=$(abspath $(BIN)):$$PATH $(BIN)/python -m companion.site --preset $(PRESET) --links

plan: $(STAMP)  ## what PRESET=paper costs before it starts: jobs, bytes, GPU hours, disk
	@$(BIN)/python -m sweep.plan --preset $(PRESET)

serve: book  ## the same, then serve the book on http://localhost:PORT (8000)
	@$(BIN)/python -m http.server --bind 127.0.0.1 --directory _build/html $(PORT)

test: $(STAMP) lint  ## lint, unit tests, every chapter under smoke, the book built and its pages checked
	@$(BIN)/python -m pytest -n 2 --dist loadgroup

screenshots: $(STAMP)  ## renew the stored pictures that the tests compare two pages with; look at them before committing
	@HEADBOUND_RENEW_SCREENSHOTS=1 $(BIN)/python -m pytest -q -k pictures tests/test_pages.py

bench: $(STAMP)  ## speed and memory beside what one would use instead
	@for script in benchmarks/bench_*.py; do $(BIN)/python $$script || exit 1; done

lint: $(STAMP)  ## ruff over code and notebooks, codespell over every text
	@$(BIN)/ruff check --quiet . && $(BIN)/ruff format --check --quiet .
	@$(BIN)/codespell

lock: $(STAMP)  ## write requirements.lock from what is installed, after a change of pyproject.toml
	@$(BIN)/python -m pip freeze --all --exclude-editable | grep -v '^pip==' | sed 's/+cpu$$//' > requirements.lock

clean:  ## delete what was generated (not .venv, nor the cache of models and texts)
	rm -rf _build book/chapters .snakemake
