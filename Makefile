# make demo        train on procedural plates, evaluate, print the table and where the pictures are
# make test        the tests, but for those that take longest: six to seven minutes on two cores
# make test-slow   the others: binaries killed and started again, several processes, every work of the benchmark
# make test-optimised   numeric tests on programs compiled as users' are; the others switch most of XLA's optimisations off
# make lint        ruff and mypy
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

$(VENV)/installed: pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

.PHONY: demo test test-slow test-optimised lint clean
demo: $(VENV)/installed
	$(BIN)/python -m experiments.autoencoder --config=demo --workdir=runs/demo

test: $(VENV)/installed
	$(BIN)/python -m pytest -m "not slow"

test-slow: $(VENV)/installed
	$(BIN)/python -m pytest -m slow

NUMERIC = ssim native metrics sliding_morphology losses autoencoder_model detectors spectrum
test-optimised: $(VENV)/installed
	STEEL_AD_OPTIMISED=1 $(BIN)/python -m pytest -m "not slow" $(NUMERIC:%=tests/test_%.py)

lint: $(VENV)/installed
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

clean:
	rm -rf $(VENV) runs
