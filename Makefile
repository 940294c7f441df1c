# `make bench` and `make test` set everything up by themselves, in .venv, and reuse it.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3.10 python3; do \
	$$p -c '' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 1
export MPLBACKEND ?= Agg

.PHONY: setup bench test test-fast lint types docs tutorials clean

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' \
	  || { echo "growmoe needs Python 3.10 to 3.13; set PYTHON=... (found: $(PYTHON))"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo 'Installing into $(VENV), once: some minutes, 7 GB, and little to see.'
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt \
	  --config-settings editable_mode=compat --editable '.[dev]'
	@touch $@

setup: $(VENV)/.installed

bench: setup
	$(BIN)/growmoe bench split-digits --seeds 3 --workers 2 --output runs/split-digits \
	  --methods growmoe,ridge,ridge-wide,slda,ranpac,replay,ewc,lwf,naive,joint

test: setup
	$(BIN)/python -m pytest -q -n 2 --maxschedchunk 1

test-fast: setup
	$(BIN)/python -m pytest -q -n 2 --maxschedchunk 1 -m 'not slow'

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

# The reference, from docstrings; a warning fails it.
docs: setup
	$(BIN)/python -W error::UserWarning:pdoc -m pdoc --docformat google -o build/docs growmoe

tutorials: setup
	$(BIN)/python tutorials/execute.py

clean:
	rm -rf $(VENV) build *.egg-info
