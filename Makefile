# `make demo` and `make test` need Python and make, nothing else.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# processes that run the tests; 0: all in one
WORKERS ?= 2
# Whole files go to a worker, in the order of tests/conftest.py.
SPREAD = -n $(WORKERS) --dist loadfile --no-loadscope-reorder
# what needs more than is installed, or runs elsewhere
OUTSIDE = peer or ray or clients or large or cuda
PYTEST_ARGS ?=
DEMO_ARGS ?=
NOTEBOOKS ?= notebooks/*.ipynb
GPU_CHECK_ARGS ?=
VLLM_EXAMPLES_ARGS ?=
# What runs under the other Python and JAX, and what does not, since it takes long and neither of them decides it.
CORE_TESTS ?= tests/unit tests/property $(addprefix --ignore=tests/,unit/test_plan.py unit/test_sampling_draws.py \
	unit/test_quantizing.py unit/test_pictures.py property/test_scheduler_machine.py property/test_scheduler_traffic.py \
	property/test_micro_batches.py property/test_replicas_machine.py)
# 1: `make compile-cuda` compiles a part of the configurations
QUICK ?= 0

VENV312 := .venv312
# A python3.12 on the PATH may be a shim that cannot run, so each candidate is tried.
FIND312 = for p in python3.12 $${PYENV_ROOT:-$$HOME/.pyenv}/versions/3.12*/bin/python3.12; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' >/dev/null 2>&1 && { echo "$$p"; break; }; done; true

# Python, and pytest of the tests, compile a file once for all their processes, also where the shell asks them not to.
export PYTHONDONTWRITEBYTECODE :=

PIP_FLAGS := -qq --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test test-thorough notebooks test-peers test-ray test-clients test-py312 compile-cuda vllm-examples gpu-check lint format format-check types lock clean

demo: $(VENV)/.installed
	$(BIN)/python -m jaxllm fetch smollm2-135m-instruct
	$(BIN)/python -m jaxllm demo $(DEMO_ARGS)

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest $(SPREAD) -m "not ($(OUTSIDE) or thorough)" $(PYTEST_ARGS)

# What `make test` leaves out: engines over several devices, real weights and notebooks, as long again.
test-thorough: $(VENV)/.installed-test
	$(BIN)/python -m pytest $(SPREAD) -m "thorough and not ($(OUTSIDE))" $(PYTEST_ARGS)

# Runs the notebooks and writes their outputs into them.
notebooks: $(VENV)/.installed-test
	$(BIN)/python tests/support/run_notebooks.py $(NOTEBOOKS)

test-peers: $(VENV)/.installed-peers
	$(BIN)/python -m pytest -m "peer or large" $(PYTEST_ARGS)

# Engines on a Ray cluster, which is this machine.
test-ray: $(VENV)/.installed-test $(VENV)/.installed-ray
	$(BIN)/python -m pytest -m ray $(PYTEST_ARGS)

# Clients of others, and the page in headless Chromium where there is one (Debian: apt-get install
# chromium-headless-shell), against the server.
test-clients: $(VENV)/.installed-test $(VENV)/.installed-clients $(VENV)/instructor/.installed
	$(BIN)/python -m pytest -m clients $(PYTEST_ARGS) tests/e2e/serve

test-py312:
	@python="$$($(FIND312))"; \
	if [ -z "$$python" ]; then echo "test-py312: skipped, no working python3.12 was found"; exit 0; fi; \
	$(MAKE) --no-print-directory $(VENV312)/.installed-smoke PYTHON312="$$python" && \
	$(VENV312)/bin/python -m pytest $(SPREAD) -m "not ($(OUTSIDE))" $(PYTEST_ARGS) $(CORE_TESTS)

# JAX's CUDA compiler works without a GPU. Where it is found it is also initialised, so it has a folder of its own, for
# each JAX one, which the first JAX's shares with jax-triton. QUICK=1 compiles a part of the configurations. The first
# test that looks at them waits for all of them.
compile-cuda: $(VENV)/.installed-test .cuda-compiler/.triton
	@python="$$($(FIND312))"; \
	if [ -z "$$python" ]; then echo "compile-cuda: JAX of Python 3.12 skipped, no working python3.12 was found"; exit 0; fi; \
	$(MAKE) --no-print-directory $(VENV312)/.installed-smoke .cuda-compiler312/.installed PYTHON312="$$python"
	COMPILE_CUDA_QUICK=$(QUICK) $(BIN)/python -m pytest -o faulthandler_timeout=3600 $(PYTEST_ARGS) tests/compile_cuda

# vLLM's offline examples, from its source distribution, which pip fetches: about half an hour.
vllm-examples: $(VENV)/.installed-test
	PYTHONPATH="$(CURDIR):$(CURDIR)/tests" $(BIN)/python -m vllm_examples $(VLLM_EXAMPLES_ARGS)

# With the Python at hand and what is installed in it: GPU machines come with their JAX, and often without a network.
gpu-check:
	PYTHONPATH="$(CURDIR):$(CURDIR)/tests$${PYTHONPATH:+:$$PYTHONPATH}" $(PYTHON) -m gpu_check $(GPU_CHECK_ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/lint-imports

format: $(VENV)/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

format-check: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-dev
	$(BIN)/pyright

# Resolves every dependency anew under both Pythons and pins what came out.
lock:
	@python="$$($(FIND312))"; [ -n "$$python" ] || { echo "make lock needs a working python3.12"; exit 1; }; \
	$(PYTHON) .ci/lock.py constraints.txt "$(PYTHON)" "$$python"

clean:
	rm -rf .venv .venv312 .cuda-compiler .cuda-compiler312 build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find jaxllm tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "jaxllm needs Python 3.11 or newer; name one: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@echo "Installing jaxllm into $(VENV)"
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/python -m pip install $(PIP_FLAGS) --editable .
	@$(BIN)/python -m compileall -q jaxllm pallas_kernels
	@touch $@

$(VENV)/.installed-%: $(VENV)/.installed
	@echo "Installing what $* needs into $(VENV)"
	@$(BIN)/python -m pip install $(PIP_FLAGS) --editable '.[$*]'
	@touch $@

# apart, since it wants other versions of what jaxllm is tested with
$(VENV)/instructor/.installed: $(VENV)/.installed
	@$(BIN)/python -m venv --clear $(VENV)/instructor
	@$(VENV)/instructor/bin/python -m pip install -qq --disable-pip-version-check "instructor>=1.17,<2"
	@touch $@

$(VENV312)/.installed-smoke: pyproject.toml constraints.txt
	@echo "Installing jaxllm into $(VENV312), with $(PYTHON312)"
	@$(VENV312)/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON312) -m venv --clear $(VENV312)
	@$(VENV312)/bin/python -m pip install $(PIP_FLAGS) --editable '.[smoke]'
	@touch $@

.cuda-compiler/.installed: $(VENV)/.installed
	$(call install_cuda_compiler,$(BIN)/python,.cuda-compiler)

# A gigabyte. The versions are here, since constraints.txt also holds for torch, whose builds for CUDA want a Triton of
# their own.
.cuda-compiler/.triton: .cuda-compiler/.installed
	@echo "Installing jax-triton beside it"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps --target .cuda-compiler \
		jax-triton==0.3.1 triton==3.9.0
	@touch $@

.cuda-compiler312/.installed: $(VENV312)/.installed-smoke
	$(call install_cuda_compiler,$(VENV312)/bin/python,.cuda-compiler312)

# $(1): the Python whose JAX it is for, $(2): the folder
define install_cuda_compiler
	@echo "Installing JAX's CUDA compiler into $(2)"
	@rm -rf $(2); version="$$($(1) -c 'import jax; print(jax.__version__)')"; \
	$(1) -m pip install -qq --disable-pip-version-check --no-deps --target $(2) \
		jax-cuda12-pjrt==$$version jax-cuda12-plugin==$$version
	@touch $@
endef
