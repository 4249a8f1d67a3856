# Everything sets itself up: a tested Python (see constraints/), make and a package index are all a machine needs.
PYTHON ?= $(shell .ci/python newest 2>/dev/null || echo python3)
VENV ?= .venv
BIN := $(VENV)/bin
CONSTRAINTS = constraints/py$(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])').txt
STAMP := $(VENV)/.installed
SAY = $(BIN)/python -c 'import sys, jax; print("testing with Python %s, jax %s" % (sys.version.split()[0], jax.__version__))'

# What depends on the versions of Python, JAX and their compiler; the rest of the suite is run on the newest Python.
SUBSET = tests/test_config.py tests/test_rooms.py tests/data tests/model/test_policies.py::test_every_policy \
	tests/model/test_causality.py tests/model/test_executors.py tests/model/test_kv.py tests/model/test_leaves.py \
	tests/inference/test_generate.py tests/inference/test_decode.py tests/inference/test_text.py \
	tests/train/test_checkpoint.py tests/train/test_step.py tests/train/test_resume.py tests/parallel/test_mesh.py \
	tests/launch/test_wheel.py tests/rlm/test_rlm_loop.py tests/rlm/repl

.PHONY: demo test test-subset docs env clean

demo: $(STAMP)  ## train MoR and its plain twin, compare, generate (10 minutes on two cores)
	$(BIN)/python -m launch.demo --workdir runs/demo

test: $(STAMP)  ## lint, types and all tests (up to an hour on two cores, less the second time)
	@$(SAY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-subset: $(STAMP)  ## the tests that versions of Python and JAX could break
	@$(SAY)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(SUBSET)

docs: $(STAMP)  ## the documentation with its API reference, into site/
	$(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

env: $(STAMP)  ## the virtual environment alone

$(STAMP): setup.py $(wildcard constraints/*.txt)
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info[:2] >= (3, 11) else "Python 3.11 or newer is needed; try make PYTHON=python3.11")'
	@test -f $(CONSTRAINTS) || { echo "No tested set of packages for this Python ($(CONSTRAINTS) is missing); try make PYTHON=python3.11"; exit 1; }
	@echo "installing for $(PYTHON) into $(VENV), with the packages of $(CONSTRAINTS)"
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) .venv-oldest runs build dist site *.egg-info
