# Every target but clean and help first sees to .venv: created and filled once, again when the requirements change.
SHELL := /bin/bash
.DEFAULT_GOAL := help

REQUIREMENTS := requirements.txt requirements-dev.txt pyproject.toml
STAMP := .venv/.installed-$(firstword $(shell cat $(REQUIREMENTS) | cksum))
PYTHON_IN := .venv/bin/python
# Processes that share out the tests; each runs on one thread.
TEST_WORKERS ?= auto

.PHONY: demo demo-short tables-demo tables-demo-short test test-slurm lint format bench clean help
export PYTHON

demo: $(STAMP)  ## the main job on the embedded demo dataset: train, evaluate, plot
	$(PYTHON_IN) tools/demo.py

demo-short: $(STAMP)  ## the same in a minute: shows that it runs, not what it reaches
	$(PYTHON_IN) tools/demo.py --short

tables-demo: $(STAMP)  ## all recipes of the paper's tables, scaled down, and the report on them: 21 minutes
	$(PYTHON_IN) tools/tables_demo.py

tables-demo-short: $(STAMP)  ## the same in a minute or two: shows that it runs
	rm -rf runs/tables_demo_short
	$(PYTHON_IN) tools/tables_demo.py --short --output-dir runs/tables_demo_short

test: $(STAMP)  ## all tests but those of test-slurm
	$(PYTHON_IN) -m pytest -n $(TEST_WORKERS) --maxprocesses 8 --dist worksteal --ignore=tests/slurm

# By themselves: their jobs take both CPUs, and their clock is SLURM's.
test-slurm: $(STAMP)  ## the launchers on a SLURM of one node, where its packages are installed and we are root
	$(PYTHON_IN) -m pytest tests/slurm

lint: $(STAMP)  ## ruff: style, likely mistakes, format
	$(PYTHON_IN) -m ruff check .
	$(PYTHON_IN) -m ruff format --check .

format: $(STAMP)  ## let ruff rewrite what it can
	$(PYTHON_IN) -m ruff check --fix .
	$(PYTHON_IN) -m ruff format .

bench: $(STAMP)  ## all benchmarks: ratios, both sides measured here
	set -e; for file in benchmarks/bench_*.py; do echo "== $$file"; $(PYTHON_IN) $$file; done

clean:  ## remove caches and builds, not .venv, datasets or runs
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache
	find . -path ./.venv -prune -o -name __pycache__ -type d -exec rm -rf {} +

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-17s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(STAMP):
	tools/setup_env.sh $@
