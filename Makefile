# make demo   explain a photograph, from a fresh clone
# make test   the tests
# make lint   ruff and pyright
# make docs   the documentation into site/, warnings are errors; make docs-serve shows it at localhost:8000
# make bench  every library on this machine; make bench-check: did ours get slower?

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python

.PHONY: demo test lint docs docs-serve bench bench-check clean

demo: $(VENV)/.installed-demo
	@$(VENV)/bin/xcam explain \
	    "$$($(PY) -c 'import pathlib, skimage; print(pathlib.Path(skimage.__file__).parent / "data/chelsea.png")')" \
	    --model lite0 --methods gradcam gradcam_pp layercam --output demo

test: $(VENV)/.installed-test
	$(PY) -m pytest -n auto --maxprocesses 8 --dist worksteal $(PYTEST_ARGS)

lint: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/pyright

docs: $(VENV)/.installed-dev
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict

docs-serve: $(VENV)/.installed-dev
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs serve

bench: $(VENV)/.installed-test
	$(PY) -m benchmarks
	$(PY) -m benchmarks --growth

bench-check: $(VENV)/.installed-test
	$(PY) -m benchmarks.check

clean:
	rm -rf $(VENV) demo dist site

# One stamp an extra: nothing is installed again until pyproject.toml changes.
$(VENV)/.installed-%: pyproject.toml | $(PY)
	$(PY) -m pip install --quiet --editable '.[$*]'
	@touch $@

$(PY):
	$(PYTHON) -m venv $(VENV)
