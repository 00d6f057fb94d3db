# make train | make test: everything from nothing, the environment included. See README.md.
PYTHON ?= python3
VENV := .venv
PY ?= $(VENV)/bin/python
# PY=python3 uses an environment that is already there, for machines without a package index
ENVIRONMENT := $(if $(filter $(VENV)/%,$(PY)),$(VENV)/.installed)

CFG ?= configs/digits_lenet.yaml
OPTS ?=
NPROC ?= 1

.PHONY: train test lint bench gpu-check format

train: $(ENVIRONMENT) $(if $(filter configs/digits_lenet.yaml,$(CFG)),digits)
	$(PY) -m torch.distributed.run --standalone --nproc_per_node=$(NPROC) train/ddp.py --cfg $(CFG) $(if $(OPTS),--opts $(OPTS))

.PHONY: digits
digits: $(ENVIRONMENT)
	$(PY) tools/convert.py digits --out data/digits

test: $(ENVIRONMENT)
	$(PY) -m pytest -m "not gpu"

lint: $(ENVIRONMENT)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(ENVIRONMENT)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

bench: digits
	$(PY) tools/benchmark.py loader --cfg $(CFG) $(if $(OPTS),--opts $(OPTS))
	$(PY) tools/benchmark.py train --cfg $(CFG) $(if $(OPTS),--opts $(OPTS))

# needs a CUDA GPU, and CIFAR-10 in data/cifar10 for the benchmark
gpu-check: $(ENVIRONMENT)
	$(PY) -c "import sys, torch; sys.exit(None if torch.cuda.is_available() else 'gpu-check needs a CUDA GPU')"
	$(PY) -m pytest -m gpu tests/test_graph.py tests/test_ddp.py
	for model in lenet alexnet resnet18; do \
	  for mode in default reduce-overhead; do \
	    $(PY) tools/benchmark.py train --cfg configs/cifar10_$$model.yaml --opts train.compile=$$mode \
	      --json docs/benchmarks/gpu_train_$${model}_$$mode.json || exit 1; \
	  done; \
	done

$(VENV)/.installed: setup.cfg pyproject.toml constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --constraint constraints.txt --editable ".[dev]"
	$(VENV)/bin/python -m pipelines.kernels
	touch $@
