# One virtual environment for everything; a target that needs it makes it.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
READY = $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help install demo test lint type bench kernels results clean

help:     ## show this help
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /\1: /' | awk -F': ' '{printf "  make %-8s %s\n", $$1, $$2}'

install: $(READY) ## make the virtual environment with the pinned versions

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev,eval]"
	touch $(READY)

demo: $(READY) ## prune the embedded model by six methods and show what each cost, also as a page (under 90 s)
	mkdir -p build
	$(BIN)/llmprune demo --html build/demo.html

test: $(READY) ## run the test suite
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 --dist worksteal tests

lint: $(READY) ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: $(READY) ## mypy --strict
	$(BIN)/mypy

bench: $(READY) ## time smaller widths, and pruning itself, against the dense model (about 35 minutes)
	$(BIN)/python eval/bench_smaller.py
	$(BIN)/python eval/bench_prune.py

kernels: $(READY) ## measure the kernels on this machine's GPU against torch's own (under 10 minutes)
	$(BIN)/python kernels/bench.py --plot

results: $(READY) ## prune and score the models of ../shared by every method (about an hour)
	$(BIN)/python eval/make_results.py

clean:    ## remove the environment and all caches
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
