# Two commands do everything on a fresh machine: `make quickstart` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: quickstart deploy-demo test test-all check format docs reference picture readme bench clean

quickstart: $(READY)  ## an unequal fleet learns together, in two to five minutes
	$(BIN)/polyrank run quickstart

deploy-demo: $(READY)  ## server and clients as processes that talk over TLS, one split; three minutes
	$(BIN)/python examples/deploy/demo.py

test: $(READY)  ## everything but the slow tests
	$(BIN)/python -m pytest -n auto --dist loadfile -m "not slow"

test-all: $(READY)  ## the slow tests too
	$(BIN)/python -m pytest

check: $(READY)  ## format, lint, types, import contracts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(READY)  ## the site, in site/; a broken link or anchor is an error
	$(BIN)/zensical build --strict --clean

reference: $(READY)  ## the pages of docs/reference that are made from the code
	$(BIN)/python -m polyrank.config.reference > docs/reference/recipes.md
	$(BIN)/python -m polyrank.config.reference client > docs/reference/client.md
	$(BIN)/python -m polyrank.config.reference app > docs/reference/app.md
	$(BIN)/python -m polyrank.config.schema
	$(BIN)/typer polyrank.cli utils docs --name polyrank --title "The command line" > docs/reference/command-line.md

picture: $(READY)  ## the picture of a run in README.md, from a real run
	$(BIN)/python examples/picture.py > docs/assets/quickstart.svg

readme: $(READY)  ## every block of README.md, as it stands; five minutes
	$(BIN)/python -m pytest tests/end_to_end/test_readme.py

bench: $(READY)  ## the benchmarks at a size that fits a coffee break; docs/explanation/benchmarks.md has the full ones
	$(BIN)/python benchmarks/server_step.py --quick
	$(BIN)/python benchmarks/local_training.py --quick
	$(BIN)/python benchmarks/server_scale.py --quick
	$(BIN)/python benchmarks/scale.py --quick
	$(BIN)/python benchmarks/split_step.py --quick
	$(BIN)/python benchmarks/split_memory.py --quick
	$(BIN)/python benchmarks/split_link.py --quick
	$(BIN)/python benchmarks/rounds.py --quick
	$(BIN)/python benchmarks/importance.py --quick

# torch first: as a dependency of another package it may come in another build than asked for.
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf .venv site .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
