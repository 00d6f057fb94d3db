# `make train` and `make test` create the environment first. All targets: CONTRIBUTING.md.
PYTHON ?= python3
VENV := .venv
PY ?= $(VENV)/bin/python
# PY=python3 uses an existing environment, on machines without a package index.
ENVIRONMENT := $(if $(filter $(VENV)/%,$(PY)),$(VENV)/.installed)

CFG ?= configs/digits_lenet.yaml
OPTS ?=
NPROC ?= 1
TORCHRUN := $(if $(filter-out 1,$(NPROC)),-m torch.distributed.run --standalone --nproc_per_node=$(NPROC))

.PHONY: train test test-all test-faults test-isa fuzz lint bench gpu-bench gpu-check gpu-dry-run gpu-calls format

train: $(ENVIRONMENT) $(if $(filter configs/digits_lenet.yaml,$(CFG)),digits)
	$(PY) $(TORCHRUN) train/ddp.py $(CFG) $(if $(OPTS),--opts $(OPTS))

.PHONY: digits
digits: $(ENVIRONMENT)
	$(PY) tools/convert.py digits --out data/digits

# Tests run in two processes, each file in one of them, in the order of the folders: long files would otherwise start last.
# WORKERS=0 runs all in the main process.
WORKERS ?= 2
PYTEST := $(PY) -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

# The fast tests: at most five minutes on two cores.
test: $(ENVIRONMENT)
	$(PYTEST) -m "not gpu and not campaign and not slow"

# All tests except campaigns and those that need a GPU.
test-all: $(ENVIRONMENT)
	$(PYTEST) -m "not gpu and not campaign"

# Fault campaigns: hundreds of kills, flipped bits and truncations. ZHU_FAULT_SEED=N repeats a failed one.
test-faults: $(ENVIRONMENT)
	$(PY) -m pytest -m "not gpu" tests/faults

# The model tests again, with oneDNN's convolutions for older CPUs.
ISAS := AVX2 SSE41
MODEL_TESTS := $(addprefix tests/models/test_,models.py layers.py factory.py timm_models.py speedrun.py pretrained.py) \
	$(addprefix tests/train/optim/test_,freeze.py muon.py factory.py) \
	tests/train/checkpoint/test_finetune.py tests/train/engine/test_clipping.py tests/train/engine/test_gradients.py
test-isa: $(ENVIRONMENT)
	$(PY) -m pytest -m campaign tests/models/cpu/test_onednn.py
	set -e; for isa in $(ISAS); do \
		ONEDNN_MAX_CPU_ISA=$$isa $(PY) -m pytest -m "not gpu and not campaign" $(MODEL_TESTS); \
	done

# Randomly damaged files of every kind. ZHU_FUZZ_SEED=N repeats a failed round.
MINUTES ?= 5
fuzz: $(ENVIRONMENT)
	ZHU_FUZZ_MINUTES=$(MINUTES) $(PY) -m pytest tests/faults/test_fuzz.py -k new_kinds -rP -W ignore

lint: $(ENVIRONMENT)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(ENVIRONMENT)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

# All benchmarks: other libraries, limits, scale. BENCH="--seconds 0.2 --only loading" selects a few.
bench: $(ENVIRONMENT)
	$(PY) tools/benchmark.py all --report docs/benchmarks $(BENCH)

# Needs a CUDA GPU. PART="training loaders" measures only these parts, each within three minutes. BENCH="--source FOLDER"
# converts CIFAR-10 if data/cifar10 is missing; BENCH="--reference FOLDER" compares the speedrun with cifar10-airbench.
PART ?=
gpu-bench: $(ENVIRONMENT)
	$(PY) -c "import sys, torch; sys.exit(None if torch.cuda.is_available() else 'gpu-bench needs a CUDA GPU')"
	$(PY) tools/benchmark.py all --report docs/benchmarks $(if $(PART),--part $(PART)) $(BENCH)

GPU_TESTS := $(shell grep -rl --include=test_*.py pytest.mark.gpu tests)

# Correctness on a CUDA GPU. Imports only files with such tests, since others need packages that the machine may lack.
# Leaves the short benchmarks to gpu-bench. WORKERS=10 takes 100 s on an H200 with 16 cores.
gpu-check: $(ENVIRONMENT)
	$(PY) -c "import sys, torch; sys.exit(None if torch.cuda.is_available() else 'gpu-check needs a CUDA GPU')"
	$(PY) -m pytest --numprocesses $(WORKERS) -m gpu -k "not short_benchmark" --tb=short --durations=10 $(GPU_TESTS)

# The GPU tests that compare no computed values, under a stand-in CUDA driver in the folder FAKECUDA. Needs no GPU.
FAKECUDA ?= ../shared/fakecuda
DRY_RUN := output/gpu-dry-run
define build_driver
	rm -rf $(DRY_RUN) && mkdir -p $(DRY_RUN)
	sh $(FAKECUDA)/build.sh "$$($(PY) -c 'import torch; print(*torch.__path__)')/.." $(DRY_RUN)/driver
endef
gpu-dry-run: $(ENVIRONMENT)
	$(build_driver)
	FAKECUDA_LOG=$(CURDIR)/$(DRY_RUN)/driver.log $(DRY_RUN)/driver/fakecuda \
		$(PY) -m pytest -m "gpu and not gpu_values" --durations=5 $(GPU_TESTS)

# Calls to the CUDA driver per training step and evaluated batch, counted by the stand-in driver: a table.
gpu-calls: $(ENVIRONMENT)
	$(build_driver)
	$(PY) tools/convert.py digits --out $(DRY_RUN)/digits
	FAKECUDA_LEVEL=2 FAKECUDA_LOG=$(CURDIR)/$(DRY_RUN)/driver.log $(DRY_RUN)/driver/fakecuda \
		$(PY) tests/helpers/driver_calls.py $(DRY_RUN)/digits

$(VENV)/.installed: setup.cfg pyproject.toml constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --constraint constraints.txt --editable ".[dev]"
	$(VENV)/bin/python -m pipelines.cpu
	touch $@
