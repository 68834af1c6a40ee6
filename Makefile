# `make bench` and `make test` are all that a fresh machine needs; `make help` lists the rest.
#
#   PYTHON   the interpreter that .venv is made from; 3.11 or newer
#   ARGS     handed to the command:  make bench ARGS="--model /models/Qwen3.5-2B"
#   EXTRAS   extras of pyproject.toml to install:  make test EXTRAS="dev peers"
#   JOBS     processes that share the test suite:  make test JOBS=1
#   WITH     an interpreter that has the packages already; nothing is installed:  make bench WITH=python3
PYTHON ?= python3
ARGS ?=
JOBS ?= 2
WITH ?=

VENV := .venv
STAMP := $(VENV)/.installed
INSTALLED := $(shell cat $(STAMP) 2>/dev/null)
GPU := $(shell nvidia-smi -L 2>/dev/null | grep -q '^GPU ' && echo gpu)
EXTRAS ?= dev $(GPU) $(INSTALLED)
WANTED := $(sort $(EXTRAS))

ifeq ($(WITH),)
RUN := $(VENV)/bin/python
READY := $(STAMP)
else
RUN := $(WITH)
READY :=
endif

empty :=
space := $(empty) $(empty)
comma := ,
# Packages are reported on stderr, so that stdout holds a command's own output alone.
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check install -c constraints.txt

.PHONY: bench test lint report clean help install FORCE
.DEFAULT_GOAL := help

bench: $(READY) ## gate and time every optimization on this machine, and write reports/
	@$(RUN) -m bench.run $(ARGS)

test: $(READY) ## the whole test suite, the lossless gates included
	@$(RUN) -m pytest -n $(JOBS) --dist loadfile $(ARGS)

lint: $(READY) ## ruff: rules and format
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .

report: $(READY) ## render reports/ again from the records alone
	@$(RUN) -m bench.report $(ARGS)

install: $(READY) ## make .venv and install the pinned packages

clean: ## remove .venv and every cache; reports/ and runs/ stay
	rm -rf $(VENV) .cache .pytest_cache .ruff_cache .hypothesis .benchmarks build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1\t\2/p' Makefile | expand -t 16
	@sed -n 's/^#   //p' Makefile

# The stamp is written last, so an install that was cut short is done again, from an empty .venv. torch goes first: with it
# in place no other package can draw in another build of it.
$(STAMP): pyproject.toml constraints.txt
	@command -v "$(PYTHON)" >/dev/null || { echo "make: $(PYTHON) is not here; isoloss needs Python 3.11 or newer: make PYTHON=/path/to/python3.12 ..." >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "make: $(PYTHON) is $$("$(PYTHON)" --version 2>&1 | head -1); isoloss needs Python 3.11 or newer: make PYTHON=python3.12 ..." >&2; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { echo "make: $(PYTHON) can't make a virtual environment (venv or ensurepip is missing); on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@echo "Installing the pinned packages ($(WANTED)) into $(VENV); this happens once." >&2
	@"$$("$(PYTHON)" -c 'import sys; print(sys._base_executable)')" -m venv --clear $(VENV)
	@$(PIP) torch setuptools >&2
	@$(PIP) --no-build-isolation -e '.[$(subst $(space),$(comma),$(WANTED))]' >&2
	@echo "$(WANTED)" > $@.part && mv $@.part $@

ifneq ($(INSTALLED),$(WANTED))
$(STAMP): FORCE
endif

FORCE:
