# make report: set up and write the accuracy report.  make test: set up and run the tests.  Both work without a GPU.
PYTHON ?= python3
BIN := .venv/bin
REPORT ?= report

.PHONY: install report test lint sanitize bench readme-results clean

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

report: .venv/installed
	$(BIN)/attnres report --out $(REPORT)

test: .venv/installed
	$(BIN)/python -m pytest

# Memory errors and shared-memory races of the CuTe kernels, on a Hopper GPU.
sanitize: .venv/installed
	for tool in memcheck racecheck; do \
	  compute-sanitizer --tool $$tool --kernel-name regex=cutlass --error-exitcode 1 \
	    $(BIN)/python -m pytest tests/test_gpu.py -k small_case || exit 1; \
	done

# Needs a GPU; installs the peers it compares with.
bench: .venv/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev,bench]"
	$(BIN)/python -m bench.run --out bench/results
	$(BIN)/python -m bench.network --out bench/results

readme-results: .venv/installed
	$(BIN)/python -m bench.readme

# mypy reads the package as it is installed: under the name attnres, with its py.typed.
lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/lint
	$(BIN)/python -m pip install --quiet --no-deps --target build/lint .
	MYPYPATH=build/lint $(BIN)/mypy --package attnres

clean:
	rm -rf .venv build report
