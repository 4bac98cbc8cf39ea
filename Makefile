# make demo, make test, make lint and make docs each do all the set-up on a fresh machine. Needs Python 3.11 or newer.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SIMULATORS := metaworld libero

.PHONY: demo test test-libero test-metaworld test-slow lint format docs clean

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11) and "vlaft needs Python 3.11 or newer")'
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

$(VENV)/.docs: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	touch $@

demo: $(VENV)/.installed
	$(BIN)/vlaft demo --out demo-out --overwrite

test: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --durations=10

# The simulators, and what draws without a screen where it may be installed; what cannot be had is told, and skipped.
$(VENV)/.drawing: $(VENV)/.installed
	ldconfig -p | grep -q libEGL.so.1 || { test "$$(id -u)" = 0 && apt-get install --yes --quiet libegl1 libgl1-mesa-dri; } \
		|| echo "libegl1 and libgl1-mesa-dri are missing and cannot be installed from here: tests that draw are skipped"
	touch $@

$(SIMULATORS:%=$(VENV)/.%): $(VENV)/.%: $(VENV)/.drawing
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$*]' \
		|| echo "vlaft[$*] cannot be installed from here: its tests are skipped"
	touch $@

$(SIMULATORS:%=test-%): test-%: $(VENV)/.%
	OMP_NUM_THREADS=1 $(BIN)/pytest -m '$* and not slow' -rs tests

test-slow: $(VENV)/.installed
	$(BIN)/pytest -m slow tests

lint: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(VENV)/.docs
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) dist build demo-out site
