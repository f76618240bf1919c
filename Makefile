# make help lists the targets. Nothing but python3 >= 3.10 and a C++20 compiler is needed; nvcc is used if there.

PYTHON ?= python3
VENV ?= .venv
SECOND_TORCH ?= 2.13.0
OLD_TORCHES ?= 2.4.1 2.9.1
WHEEL_TORCHES ?= 2.10.0 2.14.1
DEMO_IMAGE ?=
DEMO_ARGS ?=
TRAIN_STEPS ?= 3000
TRAIN_OUT ?= runs/demo
BENCH_ARGS ?=
PYTEST_ARGS ?=
FUZZ_CALLS ?= 10000
FUZZ_SEED ?=
SANITIZE_CALLS ?= 3000
SOAK_STEPS ?= 10000
PYTEST_WORKERS ?= auto
DYHEAD_REQUIRE ?= cpu
export DYHEAD_REQUIRE
ifeq ($(CI),true)
  export DYHEAD_WERROR ?= on
endif

SECOND_VENV := .venv-second

ifeq ($(VENV),none)
  RUN := $(PYTHON)
  ENVIRONMENT :=
  SECOND :=
else
  RUN := $(VENV)/bin/python
  ENVIRONMENT := $(VENV)/.installed
  ifeq ($(SECOND_TORCH),none)
    SECOND :=
  else
    SECOND := second-venv
    export DYHEAD_SECOND_PYTHON := $(CURDIR)/$(SECOND_VENV)/bin/python
  endif
endif

# $(call make_venv,directory): a working virtual environment there, or an error that says what is missing.
define make_venv
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 10) and \
	  "error: expected Python >= 3.10, got %d.%d from $(PYTHON); run make PYTHON=/path/to/python3" % v[:2])'
	@$(1)/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(1) || \
	  { echo "error: $(PYTHON) -m venv failed; install its venv module (apt install python3-venv)" >&2; exit 1; }
endef

.DEFAULT_GOAL := help
.PHONY: help venv second-venv build test test-old-torch fuzz sanitize soak aarch64 demo demo-train docs lint format \
  bench gpu-check wheel wheel-check clean

help: ## list the targets and variables
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sort | sed -E 's/^([a-z0-9-]+):.*## (.*)/  \1\t\2/' | expand -t 16
	@echo
	@echo "variables:"
	@echo "  PYTHON=python3        the Python that makes the environment, or with VENV=none the one to use"
	@echo "  VENV=.venv            where to install; none: use PYTHON as it is and install nothing"
	@echo "  DEMO_IMAGE=path       the photograph of make demo; DEMO_ARGS: more of its options"
	@echo "  TRAIN_STEPS=$(TRAIN_STEPS), TRAIN_OUT=$(TRAIN_OUT)  of make demo-train; one that was stopped goes on"
	@echo "  PYTEST_ARGS, BENCH_ARGS, GPU_CHECK_ARGS  options of pytest, the benchmarks and gpu-check"
	@echo "  FUZZ_CALLS=$(FUZZ_CALLS), FUZZ_SEED  of make fuzz; without a seed one is drawn and printed"
	@echo "  SANITIZE_CALLS=$(SANITIZE_CALLS), SOAK_STEPS=$(SOAK_STEPS)  of make sanitize and make soak"
	@echo "  PYTEST_WORKERS=auto   processes that share the tests: a number, auto: one for each CPU, none: no sharing"
	@echo "  SECOND_TORCH=$(SECOND_TORCH)   the other torch that the library is tested under; none: skip that"
	@echo "  OLD_TORCHES=\"$(OLD_TORCHES)\", WHEEL_TORCHES=\"$(WHEEL_TORCHES)\"  of make test-old-torch and wheel-check"
	@echo "  DYHEAD_REQUIRE=cpu    libraries whose build must succeed, e.g. cpu,cuda"
	@echo "  DYHEAD_CUDA_ARCHS, DYHEAD_CUDA=off or local, DYHEAD_WERROR=on, DYHEAD_LINEINFO=on, CXX, CUDACXX, MAX_JOBS: see setup.py"

venv: $(ENVIRONMENT) ## create .venv with the pinned packages of constraints.txt

$(VENV)/.installed: constraints.txt
	$(call make_venv,$(VENV))
	$(VENV)/bin/python -m pip install -r constraints.txt
	@touch $@

second-venv: ## create the environment with the second torch that make test uses
	$(call make_venv,$(SECOND_VENV))
	@if [ ! -e $(SECOND_VENV)/.installed-$(SECOND_TORCH) ]; then \
	  if $(SECOND_VENV)/bin/python -m pip install -c constraints.txt numpy && \
	     $(SECOND_VENV)/bin/python -m pip install torch==$(SECOND_TORCH); then \
	    rm -f $(SECOND_VENV)/.installed-*; touch $(SECOND_VENV)/.installed-$(SECOND_TORCH); \
	  else \
	    echo "WARNING: torch $(SECOND_TORCH) could not be installed into $(SECOND_VENV): its test cannot run" >&2; \
	  fi; \
	fi

build: $(ENVIRONMENT) ## build the native libraries in place (dyhead_cuda/lib)
	$(RUN) setup.py --quiet build_ext --inplace

# Tests start processes of their own: threads that wait must not spin on the cores of others.
test: export OMP_WAIT_POLICY ?= passive
ifneq ($(PYTEST_WORKERS),none)
# Processes fill the cores, so each has one thread; tests of several threads ask for them.
test: export OMP_NUM_THREADS ?= 1
test: PYTEST_SHARE := -n $(PYTEST_WORKERS) --dist worksteal
endif
test: build $(SECOND) ## run all tests
	$(RUN) -m pytest $(PYTEST_SHARE) --durations=25 $(PYTEST_ARGS)

test-old-torch: $(ENVIRONMENT) ## test builds for torch releases before 2.10, each in an environment of its own
	$(RUN) -m tests.old_torch $(OLD_TORCHES)

fuzz: build ## random calls of everything public, against the reference (docs/reliability)
	$(RUN) -m tests.fuzz --calls $(FUZZ_CALLS) $(if $(FUZZ_SEED),--seed $(FUZZ_SEED))

sanitize: build ## the CPU kernels under AddressSanitizer, UBSan and ThreadSanitizer (docs/reliability)
	$(RUN) -m tests.sanitizers --calls $(SANITIZE_CALLS)

soak: build ## train for long, and see that memory stays flat (docs/reliability)
	$(RUN) -m tests.soak --steps $(SOAK_STEPS)

aarch64: $(ENVIRONMENT) ## compile the CPU kernels for aarch64 (ARM) and test them under qemu (docs/reliability)
	$(RUN) -m tests.aarch64 $(PYTEST_ARGS)

# Nobody should wait minutes for code for GPUs that are elsewhere before the first picture.
demo demo-train: export DYHEAD_CUDA ?= local
demo: build ## run the head on a photograph, compare with the reference, draw what it attends to
	$(RUN) -m dyhead_cuda demo $(if $(DEMO_IMAGE),--image "$(DEMO_IMAGE)") $(DEMO_ARGS)

demo-train: build ## train a small detector on handwritten digits (under 15 minutes on 2 cores)
	$(RUN) -m dyhead_cuda train --steps $(TRAIN_STEPS) --pictures 12 --out $(TRAIN_OUT)

docs: export NO_MKDOCS_2_WARNING := 1
docs: $(ENVIRONMENT) ## build the documentation's site in build/site; a warning is an error
	$(RUN) -m mkdocs build --strict

lint: $(ENVIRONMENT) ## check style, formatting and types
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(call clang_format,--dry-run -Werror)

format: $(ENVIRONMENT) ## format all sources
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .
	$(call clang_format,-i)

clang_format = find csrc benchmarks examples tests/simt tests/sanitizers \( -name '*.h' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.cu' \) -print0 | \
  xargs -0 $(RUN) -c 'import clang_format; clang_format.clang_format()' $(1)

bench: build ## measure speed and memory against what people run (docs/performance.md)
	$(RUN) -m benchmarks $(BENCH_ARGS)

# A GPU machine may reach no network. Where nothing can be installed, which pip soon says, PYTHON is used as it is.
gpu-check: ## build for the GPU here, test, run the sanitizers, benchmark (under 9 minutes)
	@run=$(RUN); export PIP_RETRIES=$${PIP_RETRIES:-1} PIP_DEFAULT_TIMEOUT=$${PIP_DEFAULT_TIMEOUT:-10}; \
	if [ -n "$(ENVIRONMENT)" ] && ! $(MAKE) -s --no-print-directory -f $(firstword $(MAKEFILE_LIST)) $(ENVIRONMENT); \
	then \
	  run=$(PYTHON); \
	  echo "gpu-check: nothing could be installed into $(VENV), so $(PYTHON) is used as it is" >&2; \
	fi; \
	$$run -m benchmarks.gpu_check $(GPU_CHECK_ARGS)

# DYHEAD_REQUIRE=cuda makes it an error if there is no CUDA wheel.
wheel: $(ENVIRONMENT) ## make the sources and the wheels of a release, in dist/
	$(RUN) -m release

wheel-check: $(ENVIRONMENT) ## the same, then run each wheel in clean environments with one torch each
	$(RUN) -m release --torches $(WHEEL_TORCHES)

clean: ## remove what was built (environments stay)
	rm -rf build dist dyhead_cuda/lib *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find dyhead_cuda tests benchmarks release -name __pycache__ -prune -exec rm -rf {} +
