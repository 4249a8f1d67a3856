# Everything sets itself up: python3.11 or 3.12, make and a package index are all a machine needs.
PYTHON ?= $(shell for p in python3.12 python3.11; do $$p -c '' 2>/dev/null && echo $$p && exit; done; echo python3)
VENV ?= .venv
BIN := $(VENV)/bin
CONSTRAINTS = constraints/py$(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])').txt
STAMP := $(VENV)/.installed

.PHONY: demo test env clean

demo: $(STAMP)  ## train MoR and its plain twin, compare, generate (10 minutes on two cores)
	$(BIN)/python -m launch.demo --workdir runs/demo

test: $(STAMP)  ## lint and all tests (20 minutes on two cores, less the second time)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

env: $(STAMP)  ## the virtual environment alone

$(STAMP): setup.py $(wildcard constraints/*.txt)
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info[:2] >= (3, 11) else "Python 3.11 or newer is needed; try make PYTHON=python3.11")'
	@test -f $(CONSTRAINTS) || { echo "No tested set of packages for this Python ($(CONSTRAINTS) is missing); try make PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) runs build dist *.egg-info
