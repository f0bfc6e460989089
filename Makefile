# Everything from a bare checkout: `make demo`, `make test`. Both create .venv on first use.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test lint format bench-gpu wheel clean

demo: $(READY)
	$(BIN)/fewbit demo

test: lint
	$(BIN)/python -m pytest

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	MYPYPATH=.venv/typecheck $(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Checks, peaks, timings and tuning of the GPU at hand, in ten minutes; writes bench/results/.
bench-gpu: $(READY)
	$(BIN)/python -m bench.gpu

# With the compiled library inside, for machines without a compiler; into dist/.
wheel: $(READY)
	$(BIN)/python -m fewbit.quant.native.build_wheel dist

# torch comes first and pinned, so that nothing pulls in a build for GPUs that are not there.
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	mkdir -p .venv/typecheck && ln -sfn ../.. .venv/typecheck/fewbit
	touch $(READY)

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
