# `make train` and `make test` set up all they need in .venv, once.
PYTHON ?= python3
BIN    := .venv/bin
SETUP  := .venv/.installed

.PHONY: train test readme docs export

train: $(SETUP)
	$(BIN)/embdrop-train settings.ini --overwrite

# Two notebooks at once, so one thread each.
test: export OMP_NUM_THREADS = 1
test: $(SETUP)
	$(BIN)/nbdev-test --do-print --n-workers 2
	$(BIN)/pytest

# Bring the library and README.md in line with the notebooks.
export: $(SETUP)
	$(BIN)/nbdev-export
	$(BIN)/nbdev-clean
	$(MAKE) readme

# nbdev's own processing of nbs/index.ipynb, then nbconvert: no Quarto needed.
readme: $(SETUP)
	$(BIN)/python tests/readme.py

docs: $(SETUP)
	@command -v quarto >/dev/null || { echo 'The site is rendered by Quarto 1.7 or later: see https://quarto.org/docs/get-started'; exit 1; }
	$(BIN)/nbdev-docs

$(SETUP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@
