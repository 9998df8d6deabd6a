# `make help` lists the targets. Everything runs in .venv, built from the locks in two steps: what
# the demo needs, and on top of it the rest (tests, notebooks, benchmarks).
PYTHON ?= $(shell command -v python3.11 || echo python3)
VENV := .venv
BIN := $(VENV)/bin
DEMO := $(VENV)/installed-demo
ALL := $(VENV)/installed-all
PIN = uv pip compile pyproject.toml --python-version 3.11 --no-annotate --quiet \
	--custom-compile-command 'make lock' $(UPGRADE)
INSTALL := $(BIN)/python -m pip install --quiet --no-deps

.DEFAULT_GOAL := help
.PHONY: help setup demo test check notebooks drill mutants api weights lock clean

help: ## List the targets
	@grep -hE '^[a-z%-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

$(DEMO): requirements.demo.lock.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) -r requirements.demo.lock.txt
	$(INSTALL) --no-build-isolation -e .
	@touch $@

$(ALL): $(DEMO) requirements.lock.txt
	$(INSTALL) -r requirements.lock.txt
	@touch $@

setup: $(ALL) ## Make the environment in .venv: everything

demo: $(DEMO) ## The whole method on a real protein, into results/demo/
	$(BIN)/python -m cryoem.demo --output results/demo

test: $(ALL) ## All tests, the notebooks included
	$(BIN)/python -m pytest -n 2 --dist worksteal
	$(BIN)/python -m pytest -n 2 --nbmake --nbmake-timeout=600 notebooks

check: $(ALL) ## Lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

notebooks: $(ALL) ## Execute the notebooks in place
	$(BIN)/jupyter nbconvert --to notebook --execute --inplace notebooks/*.ipynb

bench-%: $(ALL) ## Measure (ARGS=... for it): bench-abinitio, -real, -own_map, -peers, -accuracy, -recovery, -refinement, -noise, -nuisances, -large, -stream, -workers, -architecture, -mismatch, -method
	$(BIN)/python benchmarks/$*.py $(ARGS)

bench-peers: | relion results/cryojax results/projectors

.PHONY: relion
relion:
	@command -v relion_reconstruct > /dev/null || apt-get install --yes relion

# cryoJAX' own environment: JAX is not in ours.
results/cryojax:
	$(PYTHON) -m venv $@
	$@/bin/python -m pip install --quiet cryojax==0.6.0 starfile==0.5.13 || { rm -r $@; false; }

# Other programs' projectors; 5 GB, for PyTorch. (torch-fourier-slice imports torch-ctf.)
results/projectors:
	$(PYTHON) -m venv $@
	$@/bin/python -m pip install --quiet torch-fourier-slice==0.6.0 torch-ctf==0.6.0 aspire==0.14.3 || { rm -r $@; false; }

drill: $(ALL) ## Read 5,000 spoilt files, kill commands at 20 moments: errors of ours, nothing lost
	$(BIN)/python tests/drill.py
	$(BIN)/python tests/kills.py

mutants: $(ALL) ## Change recovery, refinement, maps and io line by line: the tests must notice
	$(BIN)/python -m pip install --quiet -c requirements.lock.txt cosmic-ray==8.7.0
	$(BIN)/python tests/mutants.py

api: $(DEMO) ## Write API.md, the page of public names
	$(BIN)/python tests/api_page.py

weights: $(DEMO) ## Train the weights that ship in data/ (an hour; goes on where it was interrupted)
	$(BIN)/cryoem train 4jsv -o data/4jsv.npz --images 640000 --seed 1 --precision mixed_bfloat16 --checkpoint results/weights/4jsv
	$(BIN)/cryoem train 1i10 -o data/1i10.npz --images 192000 --seed 1 --precision mixed_bfloat16 --checkpoint results/weights/1i10
	cd data && sha256sum *.gz *.npz > SHA256SUMS

lock: ## Resolve pyproject.toml into the two locks (needs uv); UPGRADE=--upgrade raises versions
	$(PIN) --all-extras -o requirements.lock.txt
	echo tensorflow-graphics==2021.12.3 >> requirements.lock.txt
	$(PIN) --extra tensorflow -c requirements.lock.txt -o requirements.demo.lock.txt

clean: ## Remove what was generated
	rm -rf results build .pytest_cache .ruff_cache .mypy_cache
