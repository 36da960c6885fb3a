PYTHON ?= python3
BIN = .venv/bin
READY = .venv/.ready
EVAL = .venv/.eval
CHECKED = nbs tests bench tools/docs.py setup.py $(wildcard distill_nb/[a-z]*.py)

.PHONY: help setup demo test docs export clean
help:
	@echo 'make demo    set up, distil the embedded teacher, end with a report (about ten minutes on two cores)'
	@echo 'make test    set up, run all notebooks and tests, check that everything is in sync'
	@echo 'make docs    README.md and the site (in _docs) from the notebooks'
	@echo 'make export  notebooks to modules'
	@echo 'make clean   remove what the other targets made, the demo included'

$(READY): settings.ini setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch $@

$(EVAL): $(READY)
	$(BIN)/pip install -q -c constraints.txt -e '.[eval]'
	touch $@

setup: $(EVAL)

demo: $(READY)
	$(BIN)/distill demo

test: $(EVAL)
	$(BIN)/python -c 'from distill_nb.synthesis import embedded_teacher; embedded_teacher()'
	$(BIN)/chkstyle $(CHECKED)
	tmp=$$(mktemp -d) && chmod 755 "$$tmp" && trap 'rm -rf "$$tmp"' EXIT && export TMPDIR="$$tmp" HF_HUB_OFFLINE=1 && \
	find nbs -name '*.ipynb' -not -path '*/.*' | sort | OMP_NUM_THREADS=1 xargs -P 2 -n 1 $(BIN)/nbdev-test && OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

docs: $(READY)
	$(BIN)/python tools/docs.py

export: $(READY)
	$(BIN)/nbdev-export

clean:
	rm -rf .venv _proc _md _docs demo build dist *.egg-info
