# Every target sets up its own virtual environment; change the interpreter with `make PYTHON=python3.12 test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DOCS_STAMP := $(VENV)/.installed-docs

.PHONY: demo test test-all lint docs pretrain clean

demo: $(STAMP)
	$(BIN)/polytask demo --output runs/demo

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n 2

test-all: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(DOCS_STAMP)
	$(BIN)/sphinx-build -W --keep-going -E docs docs/_build/html

# Trains the backbone that ships with the package and writes its weights into src/polytask/weights.
pretrain: $(STAMP)
	$(BIN)/polytask train recipes/rooms/pretrain.yaml --output runs/pretrain
	$(BIN)/python -m polytask.convert.shipped runs/pretrain

clean:
	rm -rf $(VENV) build dist docs/_build .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch comes first and alone, in the range that pyproject.toml asks for, so that pip takes the build that
# it is configured to find (CPU or CUDA) and keeps it.
$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -c 'import tomllib; print("\n".join(d for d in tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"] if d.startswith("torch")))' > $(VENV)/torch.txt
	$(BIN)/pip install -r $(VENV)/torch.txt
	$(BIN)/pip install -e '.[dev,data,tb]'
	touch $@

$(DOCS_STAMP): $(STAMP)
	$(BIN)/pip install -e '.[docs]'
	touch $@
