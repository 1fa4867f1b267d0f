# Two commands: `make serve` and `make test`. Both set up .venv themselves, and need only Python >= 3.11 and make.
PYTHON ?= python3
CONFIG ?= configs/demo.yaml
ARGS ?=

SHELL := /bin/sh
VENV_PYTHON := .venv/bin/python
PIP := $(VENV_PYTHON) -m pip --disable-pip-version-check --quiet
# What .venv was made from; it is made anew when one of these files, or the folder it lies in, is another.
STATE := { cat pyproject.toml constraints.txt Makefile | cksum; pwd; }
# Whether .venv still works: packages are looked up, not imported, so that this costs a few hundredths of a second.
WORKS := from importlib.util import find_spec; assert all(map(find_spec, "torch ray transformers pytest xdist configs".split()))
# Whether a .venv of another state can be brought up to date: a Python that is new enough, in this folder, with pip.
USABLE := import sys, os, pip; assert sys.version_info >= (3, 11) and open(".venv/pyvenv.cfg").read().rstrip().endswith(os.getcwd() + "/.venv")

.PHONY: help serve test check clients venv clean
.DEFAULT_GOAL := help

help: ## what there is
	@echo 'make serve [CONFIG=configs/demo.yaml]   serve a model until Ctrl-C; ARGS=--dashboard adds Ray'"'"'s dashboard'
	@echo 'make test                               lint, types and tests'
	@echo 'make check                              lint and types only'
	@echo 'make clients                            real clients against a replica; sets them up in .clients (Node, Java 17)'
	@echo 'make clean                              remove .venv, .clients and caches'
	@echo 'PYTHON=python3.12 make ...              set up with another Python (3.11 or newer)'

serve: venv
	@exec $(VENV_PYTHON) -m deployments.serve.command $(CONFIG) $(ARGS)

# pytest ends with 5 where ARGS chose no test: one of the halves may.
test: check
	@echo '== pytest: what takes one core, two at a time'
	@one=0; $(VENV_PYTHON) -m pytest --cores=one -n 2 --dist loadfile $(ARGS) || one=$$?; \
	echo '== pytest: ranks and servers, which take all cores'; \
	all=0; $(VENV_PYTHON) -m pytest --cores=all $(ARGS) || all=$$?; \
	case "$$one $$all" in '0 0' | '0 5' | '5 0') ;; *) exit 1 ;; esac

check: venv
	@echo '== ruff'
	@$(VENV_PYTHON) -m ruff check .
	@$(VENV_PYTHON) -m ruff format --check .
	@echo '== mypy --strict'
	@$(VENV_PYTHON) -m mypy

clients: venv
	@PYTHON=$(PYTHON) sh tests/clients/set_up.sh
	@$(VENV_PYTHON) -m pytest -m clients tests/clients $(ARGS)

venv:
	@set -e; \
	if [ "$$($(STATE))" = "$$(cat .venv/state 2>/dev/null)" ] && $(VENV_PYTHON) -I -c '$(WORKS)' 2>/dev/null; then exit 0; fi; \
	command -v $(PYTHON) >/dev/null || { \
		echo "$(PYTHON) is not here: install Python 3.11 or newer, or name one: PYTHON=/path/to/python3.11 make ..."; exit 1; }; \
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "stagemesh needs Python 3.11 or newer, but $(PYTHON) is $$($(PYTHON) -V 2>&1)."; \
		echo "Name another: PYTHON=python3.11 make ..."; exit 1; }; \
	if [ "$$($(STATE))" = "$$(cat .venv/state 2>/dev/null)" ] || ! $(VENV_PYTHON) -c '$(USABLE)' 2>/dev/null; then \
		echo '== making .venv'; rm -rf .venv; \
		$(PYTHON) -m venv .venv || { \
			rm -rf .venv; echo 'Its venv module does not work (on Debian: apt-get install python3-venv).'; exit 1; }; \
	fi; \
	rm -f .venv/state; \
	echo '== installing torch (once; the largest part)'; \
	$(PIP) install -c constraints.txt torch==2.13.0; \
	echo '== installing the rest (once)'; \
	$(PIP) install -c constraints.txt hatchling editables; \
	$(PIP) install -c constraints.txt --no-build-isolation -e '.[dev]'; \
	$(STATE) > .venv/state.new; mv .venv/state.new .venv/state

clean:
	rm -rf .venv .clients .mypy_cache .ruff_cache .pytest_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
