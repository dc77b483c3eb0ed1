# One command per job; CI runs exactly these. `make help` lists them.
#
#   make serve HOST=0.0.0.0 PORT=9000 MODEL_STORE=/my/models
#   make test ARGS="-k masks -x"
#   make setup PYTHON=python3.12

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP_FLAGS ?= --quiet
DEV_STAMP := $(VENV)/.installed-dev
PYTHON ?= python3 python3.13 python3.12 python3.11

.DEFAULT_GOAL := help
.PHONY: help setup serve test check format bench clean

help: ## List the targets
	@sed -nE 's/^([a-z]+):.*## (.*)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 10

setup: $(DEV_STAMP) ## Create .venv and install the package with what its tests need

$(BIN)/python:
	@for python in $(PYTHON); do \
		if $$python -c 'import sys, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null; then \
			echo "Creating $(VENV) with $$($$python --version)"; \
			exec $$python -m venv $(VENV); \
		fi; \
	done; \
	echo "RoIServe needs Python 3.11, 3.12 or 3.13 with its venv module (Debian: apt-get install python3-venv)." >&2; \
	echo "None of these is one: $(PYTHON). Name another with make PYTHON=/path/to/python." >&2; \
	exit 1

# Made again only when what is to be installed has changed.
$(STAMP): pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing into $(VENV); the first time this downloads about 3 GB, PyTorch with CUDA for the most part,"
	@echo "and says nothing for some minutes (make setup PIP_FLAGS= shows pip at work)"
	@$(BIN)/python -m pip install $(PIP_FLAGS) --disable-pip-version-check --constraint constraints.txt --editable '.[openvino,timm]'
	@touch $@

$(DEV_STAMP): $(STAMP)
	@$(BIN)/python -m pip install $(PIP_FLAGS) --disable-pip-version-check --constraint constraints.txt --editable '.[dev,openvino,otel,quantize,ray,timm]'
	@touch $@

# A flag only where one was asked for, so that ROISERVE_HOST and the like count. The page compares RoI operators.
serve: export ROISERVE_ALLOW_ROI_OP_OVERRIDE ?= true
serve: $(STAMP) ## Serve the bundled models on http://127.0.0.1:8000 (HOST=, PORT=, MODEL_STORE=)
	@exec $(BIN)/roiserve serve $(if $(HOST),--host '$(HOST)') $(if $(PORT),--port '$(PORT)') \
		$(if $(MODEL_STORE),--model-store '$(MODEL_STORE)')

test: setup ## Run all tests (ARGS= goes to pytest)
	@tests/install_tools.sh
	@$(BIN)/python -m pytest $(ARGS)

check: setup ## Lint, formatting, types, import directions
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest --quiet tests/test_architecture.py

format: setup ## Bring the code into the form that `make check` expects
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .

BENCH ?= $(patsubst benchmarks/%.py,%,$(filter-out benchmarks/_% benchmarks/gpu.py,$(wildcard benchmarks/*.py)))
bench: setup ## Run the benchmarks, all or BENCH='ops serve'; results in build/benchmarks (ARGS= goes to each)
	@failed=; for name in $(BENCH); do \
		echo "== $$name"; $(BIN)/python -m "benchmarks.$$name" $(ARGS) || failed="$$failed $$name"; \
	done; \
	if [ -n "$$failed" ]; then echo "failed:$$failed; again with: make bench BENCH='$${failed# }'" >&2; exit 1; fi

clean: ## Remove caches and build outputs; .venv stays
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
