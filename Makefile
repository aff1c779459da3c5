# Every target sets up what it needs in .venv, and again when pyproject.toml, constraints.txt or the C++ kernels change. The
# package is installed editable: what runs is always the code in the tree.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Where there is Triton.
LINUX := $(filter Linux,$(shell uname))
# In two processes of one thread each, which take the files of tests in turns.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
# The GPU's kernels on the CPU, in Triton's interpreter.
INTERPRETED := TRITON_INTERPRET=1 $(PYTEST) \
	$(patsubst %,tests/%.py,gpu/test_gpu_kernels $(addprefix rule/test_,rule precision rounding storage guard) sharding/test_sharding)
NEWEST_TRITON := 3.9.0
FRESH := build/fresh
INPUTS := pyproject.toml constraints.txt Makefile $(wildcard src/torchlamb/backends/csrc/*)

.PHONY: demo bert test test-all test-slow soak check bench docs dist sanitize clean

demo: .venv/demo.stamp
	$(BIN)/python examples/digits.py

# BERT-tiny on the source of Python's standard library. Stopped, it goes on where it was: out/bert has its checkpoints.
bert: .venv/bert.stamp
	$(BIN)/python examples/bert/pretrain.py --trust-ratios --noise-scale $(if $(wildcard out/bert/checkpoints/*),--resume)

test: .venv/test.stamp
	$(PYTEST) -m "not slow"
	$(if $(LINUX),$(INTERPRETED) -m "not slow")

test-all: test test-slow

# What `test` leaves out, one fresh seed for all of what `test` draws at random, and the GPU's kernels with the newest Triton.
test-slow: .venv/all.stamp $(if $(LINUX),.venv/triton.stamp)
	$(PYTEST) -m slow
	$(if $(LINUX),$(INTERPRETED) -m slow)
	$(BIN)/python tests/soak.py --rounds 1
	$(if $(LINUX),PYTHONPATH=.venv/newest-triton $(BIN)/python -m pytest tests/gpu/test_gpu.py -m "not slow")
	$(if $(LINUX),PYTHONPATH=.venv/newest-triton $(INTERPRETED) -m "not slow")

# Fresh seeds until the time is up.
MINUTES ?= 60
soak: .venv/test.stamp
	$(BIN)/python tests/soak.py --minutes $(MINUTES)

check: .venv/test.stamp
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

bench: .venv/test.stamp
	$(BIN)/python benchmarks/step_time.py

# The pages of docs/ as a site in build/docs. Every warning is an error: a link that leads nowhere, a page that no other names.
docs: .venv/docs.stamp
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs build/docs

# The sdist, and the wheel that is built from it, in dist/; then the tests against the installed wheel, in an environment of its own.
# The same commit gives the same bytes.
dist: export SOURCE_DATE_EPOCH := $(shell git log -1 --format=%ct)
dist: .venv/all.stamp
	rm -rf build/dist dist $(FRESH)
	$(BIN)/python -m build --outdir build/dist .
	PATH=$(CURDIR)/$(BIN):$$PATH $(BIN)/python -m auditwheel repair --wheel-dir dist build/dist/*.whl
	cp build/dist/*.tar.gz dist
	TORCHLAMB_DIST=$(CURDIR)/dist $(BIN)/python -m pytest -m slow tests/house/test_dist.py
	$(PYTHON) -m venv $(FRESH)
	$(FRESH)/bin/python -m pip install -q -c constraints.txt torch
	$(FRESH)/bin/python -m pip install -q -c constraints.txt "$$(echo dist/*.whl)[demo,test]"
	cd $(FRESH) && bin/python -c 'import torchlamb; assert torchlamb.__file__.startswith("$(CURDIR)/$(FRESH)"), torchlamb.__file__'
	cd $(FRESH) && bin/python -m pytest -c $(CURDIR)/pyproject.toml -m "not slow" $(CURDIR)/tests

# The kernels with the address and undefined behaviour sanitizers, on every combination of dtypes and options, and for a minute
# on odd tensors.
sanitize: .venv/test.stamp
	cmake -S src/torchlamb/backends/csrc -B build/sanitized -DTORCHLAMB_SANITIZE=ON -DCMAKE_CXX_COMPILER=$(CXX)
	cmake --build build/sanitized
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0 \
		PYTHONPATH=tests $(BIN)/python tests/kernels/sanitized_kernels.py build/sanitized/libtorchlamb_cpu.so 60

.venv/docs.stamp: .venv/torch.stamp
	$(PIP) install -q -c constraints.txt -e '.[docs]'
	@touch $@

# The BERT example, what the library is used with (Hugging Face, Lightning, DeepSpeed, TensorBoard), and what makes distributions.
.venv/all.stamp: .venv/test.stamp
	$(PIP) install -q -c constraints.txt -e '.[bert,deepspeed,dist,ecosystem]'
	@touch $@

# Triton alone, before the one that torch was made with.
.venv/triton.stamp: .venv/test.stamp
	rm -rf .venv/newest-triton
	$(PIP) install -q --no-deps --target .venv/newest-triton triton==$(NEWEST_TRITON)
	@touch $@

clean:
	rm -rf .venv build dist out .mypy_cache .pytest_cache .ruff_cache .hypothesis src/*.egg-info

.venv/made.stamp:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "torchlamb needs Python 3.10 or newer: make PYTHON=python3.12")'
	@echo "Setting up .venv; the first time this takes some minutes."
	rm -rf .venv
	$(PYTHON) -m venv .venv
	@touch $@

# torch first and alone: the packages that follow then find it there instead of choosing a build of their own.
.venv/torch.stamp: .venv/made.stamp $(INPUTS)
	$(PIP) install -q -c constraints.txt torch
	@touch $@

.venv/demo.stamp: .venv/torch.stamp
	$(PIP) install -q -c constraints.txt -e '.[demo]'
	@touch $@

.venv/bert.stamp: .venv/torch.stamp
	$(PIP) install -q -c constraints.txt -e '.[bert]'
	@touch $@

.venv/test.stamp: .venv/torch.stamp
	$(PIP) install -q -c constraints.txt -e '.[demo,test]'
	@touch $@
