# Every target makes the environment it needs (.venv) on its own.
# Variables: PYTHON, DEMO_ARGS, TEST_ARGS, TEST_JOBS, TEST_MARKS.

# The tests of what stands on the kernels. The kernels' own name their backend; the rest never computes a bottleneck.
# Left out are two files of long runs whose bottlenecks are those of the others.
TRITON_TESTS := tests/bottlenecks tests/models tests/tasks tests/commands tests/demo tests/training/test_train.py \
    tests/test_evaluate.py --ignore=tests/tasks/test_mixture.py --ignore=tests/tasks/test_gqa_and_nlvr2.py
PYTHON ?= python3
TEST_JOBS ?= 2
TEST_ARGS ?=
TEST_MARKS ?= not slow and not exhaustive
DEMO_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help demo test test-triton reliability models lint format clean

help:
	@echo "make demo     train and compare every routing function on a small made-up data set (DEMO_ARGS='--quick')"
	@echo "make test     run the tests (TEST_JOBS=2, TEST_ARGS='-k metrics', TEST_MARKS=slow for the slow ones)"
	@echo "make test-triton   the tests of models and training on the Triton kernels, in their interpreter"
	@echo "make reliability   the tests of faults: broken inputs, full disks, kills, signals, load (docs/reliability.md)"
	@echo "make models   try every kind of model and write docs/models.md (5 minutes)"
	@echo "make lint     check style without changing a file"
	@echo "make format   rewrite the files in the project's style"
	@echo "make clean    remove the environment, builds and caches (runs/ stays)"

demo: $(READY)
	$(BIN)/routingvl demo $(DEMO_ARGS)

# One thread per worker: the tests use tiny models, for which more threads only cost time.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_JOBS) --dist worksteal -m "$(TEST_MARKS)" $(TEST_ARGS)

test-triton: export ROUTINGVL_BACKEND := triton
test-triton: export TRITON_INTERPRET := 1
test-triton: override TEST_ARGS := $(TRITON_TESTS) $(TEST_ARGS)
test-triton: test

reliability: override TEST_MARKS := reliability
reliability: override TEST_ARGS := tests/reliability $(TEST_ARGS)
reliability: test

models: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python tests/model_trials.py > docs/models.md.new
	mv docs/models.md.new docs/models.md

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is written last, so an installation that was broken off is started again by the next make.
$(READY): setup.py pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "no $(PYTHON) found: install Python 3.10 or newer, or say make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "routingvl needs Python 3.10 or newer, $(PYTHON) is $$($(PYTHON) -V 2>&1): say make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	    { echo "$(PYTHON) cannot make environments: install its venv package (Debian and Ubuntu: apt install python3-venv)"; exit 1; }
	@echo "making $(VENV) and installing into it, which takes some minutes"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@
