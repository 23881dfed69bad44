# One verb each. Bare `make` lists them. All work happens in .venv, made on first use and again when the lock file changes.
#
# Needs Python 3.11 or newer and make. On Debian, as root, missing system packages are installed by apt; otherwise they are
# named. Tests and measurements that need an optional one skip without it, except where CI=true: there it has to be present.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
ARGS ?=

# program=Debian packages that bring it
OPTIONAL_TOOLS := cc=gcc,libc6-dev wrk=wrk ip=iproute2 sqlite3=sqlite3

.ONESHELL:
.SHELLFLAGS := -euc
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

.PHONY: help
help: ## list the verbs
	@sed -nE 's/^([a-z]+):[^#]*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

.PHONY: demo
demo: $(INSTALLED) ## a running engine with two weeks of slots, and what to try (ARGS="--data DIR" keeps the data)
	@exec $(BIN)/slotkeeper demo $(ARGS)

.PHONY: test
test: $(INSTALLED) tools ## the test suite (ARGS="-k name" for a part)
	@$(BIN)/python -m pytest $(ARGS)

.PHONY: lint
lint: $(INSTALLED) ## rules, format, types, import directions
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

.PHONY: format
format: $(INSTALLED) ## bring the code into form
	$(BIN)/ruff check --fix-only --quiet
	$(BIN)/ruff format

.PHONY: sim
sim: $(INSTALLED) ## simulated shards that crash and lose messages, run by run from a seed (SEED=1 RUNS=1000)
	@$(BIN)/python -m tests.sim.run --seed $(or $(SEED),1) --runs $(or $(RUNS),1000)

.PHONY: chaos
chaos: $(INSTALLED) tools ## kill and freeze real processes, damage journals: the long forms
	@$(BIN)/python -m pytest tests/chaos tests/journal -m "slow or not slow" $(ARGS)

.PHONY: bench
bench: $(INSTALLED) tools ## reservations a second over HTTP, beside an empty handler
	@$(BIN)/python perf/throughput.py $(ARGS)

.PHONY: replay
replay: $(INSTALLED) ## replay a year of real grocery orders and prove the outcome
	@$(BIN)/python perf/replay.py $(ARGS)

.PHONY: lock
lock: ## pin all dependencies anew
	@scratch=$$(mktemp -d)
	trap 'rm -rf "$$scratch"' EXIT
	$(PYTHON) -m venv "$$scratch"
	"$$scratch/bin/python" -m pip --quiet --disable-pip-version-check install uv
	"$$scratch/bin/uv" --quiet pip compile --universal --upgrade --generate-hashes pyproject.toml -o requirements.lock
	"$$scratch/bin/uv" --quiet pip compile --universal --upgrade --generate-hashes pyproject.toml --group dev \
	    -o requirements-dev.lock

.PHONY: clean
clean: ## remove everything that make and the tools made here
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build dist .coverage*
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): requirements-dev.lock pyproject.toml
	@command -v $(PYTHON) > /dev/null || { echo "there is no $(PYTHON): install Python 3.11 or newer"; exit 1; }
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	    || { echo "Python 3.11 or newer is needed, $(PYTHON) is older: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -c 'import ensurepip, venv' 2> /dev/null || { $(call apt,python3-venv) }
	echo "Making $(VENV) from requirements-dev.lock: half a minute, once"
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --require-hashes -r requirements-dev.lock
	$(PIP) install --no-deps --no-build-isolation --editable .
	touch $@

.PHONY: tools
tools:
	@PATH="$$PATH:/usr/sbin:/sbin"
	missing=""
	for tool in $(OPTIONAL_TOOLS); do
	    command -v "$${tool%%=*}" > /dev/null || missing="$$missing$${missing:+ }$$(echo "$${tool#*=}" | tr , ' ')"
	done
	test -z "$$missing" && exit 0
	( $(call apt,$$missing) ) && exit 0
	test "$${CI:-}" != true || { echo "CI=true: that is an error"; exit 1; }
	echo "Going on without: what needs them is skipped."

# Shell words that install Debian packages, or say what is missing and fail.
apt = if [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null; then \
          apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends $(1); \
      else echo "missing: $(strip $(1)). On Debian: sudo apt-get install $(strip $(1))"; false; fi;
