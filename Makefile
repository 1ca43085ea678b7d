# make demo, make test: everything from a fresh machine with Python alone. PY: the Python to make the environment with.
PY ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test setup lint examples clean

setup: $(VENV)/.done

$(VENV)/.done: pyproject.toml constraints.txt
	$(PY) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

demo: setup
	$(BIN)/python -m multistep.demo

# Tiny models: a thread a worker is faster than more threads for one.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

examples: setup
	$(BIN)/python examples/quickstart.py
	$(BIN)/python examples/own_loop.py
	$(BIN)/python examples/any_module.py
	$(BIN)/python examples/sklearn_pipeline.py
	$(BIN)/python examples/keras_lstm.py

clean:
	rm -rf $(VENV) runs
