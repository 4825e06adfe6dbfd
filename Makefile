# `make demo`: from nothing to a model that transcribes. `make test`: everything the tests need, then all tests.
# Both work in .venv, made here. On Linux pip may install torch with CUDA, gigabytes of it; the smaller CPU build
# comes with  make demo TORCH_INDEX=URL  of PyTorch's index of CPU builds.

VENV := .venv
PYTHON ?= python3
TORCH_INDEX ?=
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Recorded telephone prompts with their texts, for recipes/telephone.yaml and its tests; Debian's names.
SPEECH_PACKAGES := asterisk-core-sounds-en-wav asterisk-core-sounds-en
# A real cluster, and a database for its accounting, that tests start; and what shows the order of system calls.
SLURM_PACKAGES := slurmctld slurmd slurm-client munge slurmdbd mariadb-server-core
TRACE_PACKAGES := strace
# A browser that opens the report, and what reads the PDF that it prints.
PAGE_PACKAGES := chromium chromium-driver fonts-dejavu-core poppler-utils
PYTEST_COMMAND := $(BIN)/python -m pytest -p tests.plugin_minutes -p tests.plugin_skips

.PHONY: demo test test-exhaustive lint docs clean

demo: $(VENV)/demo.installed
	$(BIN)/python -m launch.demo

# All tests in two processes; with PYTEST, the arguments of pytest, those alone and in one.
test: $(VENV)/dev.installed
	@.ci/debian-packages $(SPEECH_PACKAGES) $(SLURM_PACKAGES) $(TRACE_PACKAGES) $(PAGE_PACKAGES)
	$(if $(strip $(PYTEST)),,.ci/test-in-halves) $(PYTEST_COMMAND) $(PYTEST)

# Every fault at every point, on every rank, under every strategy: hours.
test-exhaustive: $(VENV)/dev.installed
	$(PYTEST_COMMAND) -m exhaustive --timeout 7200 $(PYTEST)

lint: $(VENV)/dev.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The pages of docs/, into build/docs/html. What follows from the code is written first; a dead link ends it.
docs: $(VENV)/docs.installed
	$(BIN)/python docs/generate.py
	$(BIN)/python -m sphinx -W --keep-going --quiet -b html -c docs . build/docs/html
	@echo build/docs/html/index.html

# torch first and alone, at the tested version: pip would take the newest, whose CUDA libraries nobody asked for.
$(VENV)/%.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(PIP) install --quiet --constraint constraints.txt --editable '.[$*]'
	touch $@

clean:
	rm -rf $(VENV) build dist
