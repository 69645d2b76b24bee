# make demo   train on procedural plates, evaluate, print the table and where the pictures are
# make test   the whole test suite
# make lint   ruff and mypy
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

.PHONY: demo test lint clean
demo: $(VENV)/installed
	$(BIN)/python -m experiments.autoencoder --config=configs/autoencoder.py:demo --workdir=runs/demo

test: $(VENV)/installed
	$(BIN)/python -m pytest

lint: $(VENV)/installed
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

clean:
	rm -rf $(VENV) runs
