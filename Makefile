# Each target makes its own virtual environment when it is missing, and renews it when pyproject.toml or
# constraints.txt changes. PYTHON chooses the interpreter (3.10 to 3.12), VENV the folder, JOBS the test processes.
PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
RUN := $(VENV)/bin/python
INSTALL := $(RUN) -m pip install --disable-pip-version-check -c constraints.txt

.PHONY: demo test lint bench docs test-gpu clean
.DELETE_ON_ERROR:

demo: $(VENV)/.core-installed
	$(RUN) -m kimi_mm demo

test: $(VENV)/.dev-installed
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(JOBS) -m "not gpu" $(PYTEST_ARGS)

lint: $(VENV)/.dev-installed
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m pyright --pythonpath $(RUN)

bench: $(VENV)/.core-installed
	$(RUN) -m benchmarks.transcribe

docs: $(VENV)/.dev-installed
	$(RUN) -m mkdocs build --strict

test-gpu: $(VENV)/.dev-installed
	$(RUN) -m pytest -m gpu $(PYTEST_ARGS)

clean:
	rm -rf $(VENV) demo-output site

$(VENV)/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' || \
	  { echo "kimi-mm needs Python 3.10 to 3.12; choose one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -m venv --clear $(VENV) || \
	  { rm -rf $(VENV); echo "cannot make $(VENV); on Debian: apt install python3-venv" >&2; exit 1; }

$(VENV)/.core-installed: pyproject.toml constraints.txt | $(VENV)/bin/pip
	$(INSTALL) -e .
	touch $@

$(VENV)/.dev-installed: pyproject.toml constraints.txt | $(VENV)/bin/pip
	$(INSTALL) -e '.[dev]'
	touch $(VENV)/.core-installed $@
