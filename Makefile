# `make help` lists the targets. Everything runs in .venv, which `make setup` builds from the lock.
PYTHON ?= $(shell command -v python3.11 || echo python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
export TF_CPP_MIN_LOG_LEVEL := 2

.DEFAULT_GOAL := help
.PHONY: help setup demo test check notebooks drill weights lock clean

help: ## List the targets
	@grep -hE '^[a-z%-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

$(STAMP): requirements.lock.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-deps -r requirements.lock.txt
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	@touch $@

setup: $(STAMP) ## Make the environment in .venv

demo: $(STAMP) ## The whole method on a real protein, into results/demo/
	$(BIN)/python -m cryoem.demo --output results/demo

test: $(STAMP) ## All tests, the notebooks included
	$(BIN)/python -m pytest
	$(BIN)/python -m pytest --nbmake --nbmake-timeout=300 notebooks

check: $(STAMP) ## Lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

notebooks: $(STAMP) ## Execute the notebooks in place
	$(BIN)/jupyter nbconvert --to notebook --execute --inplace notebooks/*.ipynb

bench-%: $(STAMP) ## Measure: bench-accuracy, -recovery, -refinement, -stream, -architecture, -mismatch, -method
	$(BIN)/python benchmarks/$*.py

drill: $(STAMP) ## Read 5,000 spoilt files: a result or an error of ours
	$(BIN)/python tests/drill.py

weights: $(STAMP) ## Train the weights that ship in data/ (an hour; goes on where it was interrupted)
	$(BIN)/python benchmarks/train_weights.py 4jsv --images 640000
	$(BIN)/python benchmarks/train_weights.py 1i10 --images 192000

lock: ## Resolve pyproject.toml into requirements.lock.txt (needs uv)
	printf '%s\n' '# Every package of the environment, exact. Made by `make lock`; installed with `pip install --no-deps -r`.' > requirements.lock.txt
	(uv pip compile pyproject.toml --all-extras --python-version 3.11 --no-header --no-annotate --quiet; \
	 echo tensorflow-graphics==2021.12.3) | sort -f >> requirements.lock.txt

clean: ## Remove what was generated
	rm -rf results build .pytest_cache .ruff_cache .mypy_cache
