# Everything a person does here, by name. A second run of a target does only what has changed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DATA := $(if $(CHURN_DATA_DIR),$(CHURN_DATA_DIR),.churnstream)
ARGS ?=
ISSUE ?=
PEERS ?=
QUICK ?=

.DELETE_ON_ERROR:
.PHONY: help setup demo test lint types fmt check claims bench bench-quick faults lock proto dashboards

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 13

setup: $(VENV)/.kafka $(DATA)/.kernels  ## the virtual environment, the jars of Kafka, the compiled kernels

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info < (3, 13) else "needs Python 3.11 or 3.12, this is " + sys.version.split()[0] + "; give another one: make setup PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	@touch $@

# uv installs a lock in a fifth of pip's time; where it cannot be had, pip does the same from the same file.
$(VENV)/.packages: $(VENV)/.python requirements.lock pyproject.toml deploy/uv.txt
	@if $(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r deploy/uv.txt; then \
	    set -ex; \
	    $(BIN)/uv pip install --quiet --python $(BIN)/python --require-hashes -r requirements.lock; \
	    $(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation -e .; \
	else \
	    set -ex; \
	    $(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock; \
	    $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .; \
	fi
	@touch $@

$(VENV)/.kafka: $(VENV)/.packages deploy/kafka.lock
	$(BIN)/churnstream stack fetch
	@touch $@

$(DATA)/.kernels: $(VENV)/.packages $(wildcard features/*.py) scoring/reasons.py scoring/treeshap.py scoring/trees.py scoring/wording.py
	$(BIN)/python -m features.compiled scoring.reasons scoring.treeshap scoring.trees scoring.wording
	@mkdir -p $(DATA) && touch $@

demo: setup  ## live churn scores for real customers; ARGS=--keep leaves it running
	@$(BIN)/churnstream demo $(ARGS)

# One process more than cores: tests that wait for a session to time out would leave a core idle.
test: setup  ## all tests, real servers included; ARGS="-k window" for some
	$(BIN)/pytest -n $$(( $$(nproc) + 1 )) $(ARGS)

lint: $(VENV)/.packages  ## ruff and the import contract
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports

types: $(VENV)/.packages  ## mypy, strict
	$(BIN)/mypy

fmt: $(VENV)/.packages  ## format, and repair what ruff can
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

proto: $(VENV)/.packages  ## the Python code of the gRPC contract, made anew
	$(BIN)/python -m bench.stubs

dashboards: $(VENV)/.packages  ## the Grafana dashboards, made anew
	$(BIN)/python -m bench.dashboards

check: lint types test  ## what continuous integration runs

claims: setup  ## measure every figure we state; ISSUE=main-job for one issue, QUICK=1 for short runs
	@$(BIN)/python -m bench.claims $(if $(ISSUE),--issue "$(ISSUE)") $(if $(QUICK),--quick) $(ARGS)

faults: setup  ## break everything on purpose and check what is left; resumes, ROUNDS=300 SEED=1 MINUTES=30
	$(BIN)/churnstream-faults simulate --seeds 0..$(or $(SEEDS),2000)
	$(BIN)/churnstream-faults mutants
	$(BIN)/churnstream-faults run --seed $(or $(SEED),1) --rounds $(or $(ROUNDS),300)
	$(BIN)/python -m bench.fuzz
	$(BIN)/churnstream-faults soak --minutes $(or $(MINUTES),30)

bench: setup  ## everything against the peers, under 30 minutes; PEERS=DIR names their directory
	@$(BIN)/python -m bench.peers --write $(if $(PEERS),--peers "$(PEERS)") $(ARGS)

bench-quick: setup  ## the same in minutes: short, once, nothing written
	@$(BIN)/python -m bench.peers --quick $(if $(PEERS),--peers "$(PEERS)") $(ARGS)

# No index address goes into the file: it is the same for every mirror.
lock: $(VENV)/.packages  ## resolve all packages anew (after a change in pyproject.toml)
	$(BIN)/uv pip compile pyproject.toml --group dev --quiet --upgrade --universal --python-version 3.11 \
	    --generate-hashes --no-emit-index-url --no-emit-find-links --no-header --no-annotate -o requirements.lock
	echo uv | $(BIN)/uv pip compile - --quiet --upgrade --universal --python-version 3.11 \
	    --generate-hashes --no-emit-index-url --no-emit-find-links --no-header --no-annotate -o deploy/uv.txt
