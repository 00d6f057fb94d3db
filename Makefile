# make train | make test: everything from nothing, the environment included. See README.md.
PYTHON ?= python3
VENV := .venv
PY ?= $(VENV)/bin/python
# PY=python3 uses an environment that is already there, for machines without a package index
ENVIRONMENT := $(if $(filter $(VENV)/%,$(PY)),$(VENV)/.installed)

CFG ?= configs/digits_lenet.yaml
OPTS ?=
NPROC ?= 1

.PHONY: train test test-all test-faults test-isa fuzz lint bench gpu-bench gpu-check gpu-dry-run format

train: $(ENVIRONMENT) $(if $(filter configs/digits_lenet.yaml,$(CFG)),digits)
	$(PY) -m torch.distributed.run --standalone --nproc_per_node=$(NPROC) train/ddp.py --cfg $(CFG) $(if $(OPTS),--opts $(OPTS))

.PHONY: digits
digits: $(ENVIRONMENT)
	$(PY) tools/convert.py digits --out data/digits

# tests run in two processes, a file in one of them; WORKERS=0 runs them in this one
WORKERS ?= 2
PYTEST := $(PY) -m pytest --numprocesses $(WORKERS) --dist loadfile

# the fast tests: at most five minutes on two cores
test: $(ENVIRONMENT)
	$(PYTEST) -m "not gpu and not campaign and not slow"

# every test that needs neither a GPU nor minutes of kills
test-all: $(ENVIRONMENT)
	$(PYTEST) -m "not gpu and not campaign"

# all faults: hundreds of kills, flips and cuts; ZHU_FAULT_SEED repeats one that failed
test-faults: $(ENVIRONMENT)
	$(PY) -m pytest -m "not gpu" tests/faults

# the model tests once more, with the convolutions that oneDNN has for older CPUs
ISAS := AVX2 SSE41
MODEL_TESTS := models activation speedrun_models pretrained transfer freeze gradients clipping muon optim
test-isa: $(ENVIRONMENT)
	$(PY) -m pytest -m campaign tests/models/test_onednn.py
	set -e; for isa in $(ISAS); do \
		ONEDNN_MAX_CPU_ISA=$$isa $(PY) -m pytest -m "not gpu and not campaign" $(MODEL_TESTS:%=tests/*/test_%.py); \
	done

# damaged files of every kind, at random; ZHU_FUZZ_SEED=N repeats a round that failed
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

# the whole run: other libraries, limits, scale; BENCH="--seconds 0.2 --only loading" and the like narrow it down
bench: $(ENVIRONMENT)
	$(PY) tools/benchmark.py all --report docs/benchmarks $(BENCH)

# needs a CUDA GPU; PART="training loaders" measures these parts alone, each within three minutes. BENCH="--source FOLDER"
# converts CIFAR-10 where data/cifar10 is missing, BENCH="--reference FOLDER" runs cifar10-airbench beside the speedrun
PART ?=
gpu-bench: $(ENVIRONMENT)
	$(PY) -c "import sys, torch; sys.exit(None if torch.cuda.is_available() else 'gpu-bench needs a CUDA GPU')"
	$(PY) tools/benchmark.py all --report docs/benchmarks $(if $(PART),--part $(PART)) $(BENCH)

GPU_TESTS := $(shell grep -rl --include=test_*.py pytest.mark.gpu tests)

# correctness on a CUDA GPU; only files with such tests are imported, since others need packages that it may lack. The
# short benchmarks are left to gpu-bench
gpu-check: $(ENVIRONMENT)
	$(PY) -c "import sys, torch; sys.exit(None if torch.cuda.is_available() else 'gpu-check needs a CUDA GPU')"
	$(PY) -m pytest -m gpu -k "not short_benchmark" --tb=short --durations=10 $(GPU_TESTS)

# The GPU tests that compare no computed values, under a stand-in CUDA driver: no GPU is needed. FAKECUDA: its folder
FAKECUDA ?= ../shared/fakecuda
DRY_RUN := output/gpu-dry-run
gpu-dry-run: $(ENVIRONMENT)
	rm -rf $(DRY_RUN) && mkdir -p $(DRY_RUN)
	sh $(FAKECUDA)/build.sh "$$($(PY) -c 'import torch; print(*torch.__path__)')/.." $(DRY_RUN)/driver
	FAKECUDA_LOG=$(CURDIR)/$(DRY_RUN)/driver.log $(DRY_RUN)/driver/fakecuda \
		$(PY) -m pytest -m "gpu and not gpu_values" --durations=5 $(GPU_TESTS)

$(VENV)/.installed: setup.cfg pyproject.toml constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --constraint constraints.txt --editable ".[dev]"
	$(VENV)/bin/python -m pipelines.cpu
	touch $@
