# make report and make test are each complete on a fresh machine: they create .venv and install what they need.
SHELL := /bin/bash
.DELETE_ON_ERROR:
.PHONY: report test lint unit notebooks nbval browser clean

BIN := .venv/bin
STAMP := .venv/.installed
# the longest first, or one of two processes would wait for the other at the end
LONGEST := $(foreach number,05 03 06 04,$(wildcard notebooks/$(number)_*.ipynb))
NOTEBOOKS := $(LONGEST) $(filter-out $(LONGEST),$(wildcard notebooks/*.ipynb notebooks/solutions/*.ipynb))
# the first Python of 3.11 or newer; set PYTHON to choose another
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
STAGE := .ci/stage
# glibc keeps the memory of a layer for the next one instead of giving it back each time: a seventh faster
export MALLOC_MMAP_THRESHOLD_ := 4294967296
export MALLOC_TRIM_THRESHOLD_ := 4294967296
# without compiled files every notebook would compile torch and diffusers anew, 8 s each; install leaves that to here
unexport PYTHONDONTWRITEBYTECODE
# Two processes of one thread each: the small networks gain little from a second thread. A file stays in one process,
# and the order stays, so that a notebook and its solutions do not score into one folder at the same time.
TWO := -n 2 --dist loadfile --no-loadscope-reorder

report: $(STAMP)
	@$(STAGE) report $(BIN)/zsad report

# Every part runs, so one run shows all that is wrong.
test: $(STAMP) browser
	@status=0; for part in lint unit nbval; do \
		$(MAKE) --no-print-directory $$part || status=1; done; exit $$status

lint: $(STAMP)
	@$(STAGE) lint $(BIN)/ruff check . && $(STAGE) format $(BIN)/ruff format --check .

unit: $(STAMP)
	@OMP_NUM_THREADS=1 $(STAGE) "unit tests" $(BIN)/python -m pytest $(TWO)

# The committed outputs are the expectation: a notebook that prints something else fails.
nbval: $(STAMP)
ifeq ($(NOTEBOOKS),)
	@echo "[zsad] no notebook to check"
else
	@$(STAGE) "synthad" $(BIN)/zsad data make synthad
	@OMP_NUM_THREADS=1 $(STAGE) "notebooks" $(BIN)/python -m pytest --nbval --nbval-current-env $(TWO) \
		--nbval-sanitize-with tests/nbval_sanitize.cfg $(NOTEBOOKS)
endif

# Runs every notebook and keeps its new outputs: read the diff before committing it.
notebooks: $(STAMP)
	@for notebook in $(NOTEBOOKS); do \
		$(STAGE) "$$notebook" $(BIN)/jupyter nbconvert --log-level WARN --to notebook --execute --inplace \
			--ExecutePreprocessor.timeout=1800 "$$notebook" || exit 1; done

browser:
	@.ci/browser

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "no Python >= 3.11 found: install one, or run make PYTHON=/path/to/python"; exit 1; }
	@test -x $(BIN)/python || $(STAGE) "new environment" $(PYTHON) -m venv .venv
	@$(STAGE) "install" $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile \
		-c constraints.txt -e '.[test]'
	@touch $@

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
