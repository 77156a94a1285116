# Every target sets up what it needs in .venv, so a fresh clone needs only python3 and make.
VENV := .venv
BIN := $(VENV)/bin
.DEFAULT_GOAL := help
.PHONY: help demo test test-vllm lint check format docs wheel clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(VENV)/.run: pyproject.toml tools/install.sh
	@echo "setting up $(VENV) (a few minutes the first time)"
	@tools/install.sh $(VENV) engine
	@touch $@

$(VENV)/.dev: $(VENV)/.run
	@tools/install.sh $(VENV) engine,dev
	@touch $@

$(VENV)/.docs: $(VENV)/.run
	@tools/install.sh $(VENV) engine,docs
	@touch $@

demo: $(VENV)/.run ## serve the embedded model and show the scheduler at work
	@$(BIN)/penstock demo

test: $(VENV)/.dev ## run all tests
	@$(BIN)/python -m pytest

$(VENV)-vllm/.done: pyproject.toml tools/install.sh
	@tools/install.sh $(VENV)-vllm vllm
	@touch $@

test-vllm: $(VENV)-vllm/.done ## run the plug-in's tests inside vLLM's CPU build
	@$(VENV)-vllm/bin/python -m pytest -W ignore::DeprecationWarning tests/vllm

lint: $(VENV)/.dev ## ruff and mypy
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy

check: lint test ## everything that CI checks

format: $(VENV)/.dev ## let ruff format and fix what it can
	@$(BIN)/ruff format
	@$(BIN)/ruff check --fix

docs: $(VENV)/.docs ## build the documentation into site/
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

wheel: $(VENV)/.run ## build the wheel into dist/
	@$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

clean: ## remove everything that make has made
	rm -rf $(VENV) $(VENV)-vllm build dist site .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find src tests tools benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
