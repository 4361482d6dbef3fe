# Two commands: `make train` shows the library at work, `make test` proves it.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= outputs

.PHONY: train test test-oldest support-table paper-table lint format docs docs-links pages page-outputs benchmark \
	experiments gpu clean help

help:            ## show the targets
	@grep -E '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/'

# torch goes first and alone: the pinned build decides which of its companions are needed.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

train: $(VENV)/installed  ## train a transformer on real text, then compare memory without and with mini-sequences
	$(BIN)/lightning-mst train hydra.run.dir=$(OUT)/train
	$(BIN)/lightning-mst compare --output $(OUT)/compare

test: $(VENV)/installed  ## run all tests that this machine can run
	$(BIN)/python -m pytest -n 2 --dist loadfile

# The other end of the supported range: the tests of what depends on transformers and Lightning.
$(VENV)-oldest/installed: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv $(VENV)-oldest
	$(VENV)-oldest/bin/python -m pip install --quiet --constraint constraints-oldest.txt torch
	$(VENV)-oldest/bin/python -m pip install --quiet --constraint constraints-oldest.txt --editable . \
		pytest pytest-timeout pytest-xdist
	touch $@

test-oldest: $(VENV)-oldest/installed  ## run the tests of the library itself on the oldest supported releases
	$(VENV)-oldest/bin/python -m pytest -n 2 --dist loadfile tests/ops tests/rewrite tests/memory tests/offload tests/training tests/strategies tests/test_callback.py

support-table: $(VENV)/installed  ## test every family of transformers and write docs/models.md's table from the results
	WRITE_SUPPORT_TABLE=1 $(BIN)/python -m pytest tests/rewrite/test_causal_lms.py

lint: $(VENV)/installed  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/installed  ## rewrite the sources in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/docs: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@

docs: $(VENV)/docs  ## build the pages and the API reference into docs/_build; warnings are errors
	$(BIN)/python -m sphinx -n -W --keep-going -q docs docs/_build

docs-links: $(VENV)/docs  ## check the links to other sites (needs the internet)
	$(BIN)/python -m sphinx -b linkcheck -q docs docs/_build/links

pages: $(VENV)/installed  ## fill README and docs with the numbers and outputs of the committed result files
	$(BIN)/python -m benchmarks.pages

page-outputs: $(VENV)/installed  ## run the documented commands (on a quiet machine) and show what they print
	$(BIN)/python -m benchmarks.outputs
	$(BIN)/python -m benchmarks.pages

$(VENV)/peers: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[peers]'
	touch $@

benchmark: $(VENV)/peers  ## time, bytes, matmuls and errors of our blocks beside the unmodified and other projects'
	$(BIN)/python -m benchmarks.run
	$(BIN)/python -m benchmarks.tables

# The paper's sizes as predictions: those of the tasks that only ask about memory.
SMOKE := $(basename $(notdir $(wildcard conf/experiment/smoke/*.yaml)))
PREDICTED := max_length max_length_accumulation max_length_quantized breakdown lm_head mlp
EXPERIMENT := $(BIN)/lightning-mst train -m experiment

experiments: $(VENV)/installed  ## run the paper's experiments in small, predict the real sizes, and write docs/experiments
	rm -rf $(OUT)/smoke $(OUT)/paper
	for name in $(SMOKE); do $(EXPERIMENT)=smoke/$$name hydra.sweep.dir=$(OUT)/smoke/$$name || exit 1; done
	for name in $(PREDICTED); do $(EXPERIMENT)=paper/$$name task.how=predicted hydra.sweep.dir=$(OUT)/paper/$$name \
		|| exit 1; done
	$(BIN)/lightning-mst report $(OUT)/smoke --output docs/experiments/smoke --title "The experiments in small"
	$(BIN)/lightning-mst report $(OUT)/paper --output docs/experiments/paper --title "The paper's sizes, predicted"

gpu: $(VENV)/peers  ## on a GPU: the tests that need one, the benchmarks, and the paper's experiments
	$(BIN)/python -m benchmarks.gpu

paper-table: $(VENV)/installed  ## predict the paper's memory figures: docs/paper_memory.md
	$(BIN)/python -m benchmarks.paper

clean:           ## remove everything that the other targets made
	rm -rf $(VENV) $(VENV)-oldest $(OUT) build dist docs/_build
