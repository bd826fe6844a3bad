# Every target but clean and help first creates and fills .venv, and fills it again when the requirements have changed.
SHELL := /bin/bash
.DEFAULT_GOAL := help

REQUIREMENTS := requirements.txt requirements-dev.txt pyproject.toml
STAMP := .venv/.installed-$(firstword $(shell cat $(REQUIREMENTS) | cksum))
PYTHON_IN := .venv/bin/python
# The rooms in which every parameter has a type.
STRICT := 'avion/models/*.py' 'avion/ops/**/*.py' 'avion/evaluation/*.py'
# The number of processes that share the tests; each process uses one thread.
TEST_WORKERS ?= auto

.PHONY: demo demo-short tables-demo tables-demo-short test test-slurm test-endurance test-endurance-short lint format bench clean help
export PYTHON

demo: $(STAMP)  ## train, evaluate and plot on the embedded demo dataset: 9 minutes
	$(PYTHON_IN) tools/demo.py

demo-short: $(STAMP)  ## run every task for one epoch on the demo dataset, to show that it works: a few minutes
	$(PYTHON_IN) tools/demo.py --short

tables-demo: $(STAMP)  ## run all recipes of the paper's tables, scaled down, and report on them: 21 minutes
	$(PYTHON_IN) tools/tables_demo.py

tables-demo-short: $(STAMP)  ## run all recipes for one short epoch, to show that they work: a minute or two
	rm -rf runs/tables_demo_short
	$(PYTHON_IN) tools/tables_demo.py --short --output-dir runs/tables_demo_short

test: $(STAMP)  ## run all tests but those of test-slurm
	$(PYTHON_IN) -m pytest -n $(TEST_WORKERS) --maxprocesses 8 --dist worksteal --ignore=tests/slurm

# These tests run alone, because their jobs take both CPUs and wait for SLURM's timers.
test-slurm: $(STAMP)  ## test the launchers on a SLURM of one node (needs root and SLURM's packages)
	$(PYTHON_IN) -m pytest tests/slurm

test-endurance: $(STAMP)  ## hurt runs many times, and count what held: about an hour
	$(PYTHON_IN) -m tests.endurance

test-endurance-short: $(STAMP)  ## the same with few tries, two scripts at a time: some minutes
	$(PYTHON_IN) -m tests.endurance --short --jobs 2

lint: $(STAMP)  ## check style, likely mistakes and format with ruff, types with pyrefly
	$(PYTHON_IN) -m ruff check .
	$(PYTHON_IN) -m ruff format --check .
	.venv/bin/pyrefly check --min-severity warn --output-format min-text
	.venv/bin/pyrefly check --min-severity warn --output-format min-text --preset strict $(STRICT)

format: $(STAMP)  ## let ruff rewrite what it can correct
	$(PYTHON_IN) -m ruff check --fix .
	$(PYTHON_IN) -m ruff format .

bench: $(STAMP)  ## run all benchmarks, which print ratios of two sides
	set -e; for file in benchmarks/bench_*.py; do echo "== $$file"; $(PYTHON_IN) $$file; done

clean:  ## remove caches and builds, not .venv, datasets or runs
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache
	find . -path ./.venv -prune -o -name __pycache__ -type d -exec rm -rf {} +

help:  ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-21s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(STAMP):
	tools/setup_env.sh $@
