PYTHON ?= python3
BIN := .venv/bin

train: .venv/.installed  ## set up, then train the small model of configs/quickstart.yaml
	$(BIN)/bigtrain ops build configs/quickstart.yaml
	$(BIN)/bigtrain train configs/quickstart.yaml

test: .venv/.test  ## set up, then style checks and tests
	$(BIN)/bigtrain ops build
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/python -m pytest --ignore tests/cluster --numprocesses 2 --dist loadfile
	$(BIN)/python -m pytest tests/cluster
	$(BIN)/python -m pytest tests/interpreted --numprocesses 2

cluster-tools:  ## install what tests of several machines need (root, Debian); from then on `make test` insists on them
	.ci/cluster-tools
	mkdir -p .venv
	touch .venv/.cluster-tools

kernels: .venv/.test  ## compile every kernel for every GPU that the tables know, and hold it to its budget
	$(BIN)/python -m bigtrain_kernels.static

.venv/.installed: setup.py pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --constraint constraints.txt --editable .
	touch $@

.venv/.test: .venv/.installed
	$(BIN)/pip install --constraint constraints.txt --editable '.[test]'
	touch $@

clean:  ## remove the environment and what tools left behind; runs/ and data/ stay
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis

help:  ## this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*##/:/'

.PHONY: train test cluster-tools kernels clean help
.NOTPARALLEL:
