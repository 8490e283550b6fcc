# make demo   explain a photograph, from a fresh clone
# make test   the tests
# make test-lowest, make test-highest   what computes, with the lowest and the highest versions that pyproject.toml allows
# make lint   ruff and pyright
# make docs   the documentation into site/, warnings are errors; make docs-serve shows it at localhost:8000
# make bench  every library on this machine; make bench-check: did ours get slower?

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python

.PHONY: demo test test-lowest test-highest lint docs docs-serve bench bench-check clean

demo: $(VENV)/.installed-demo
	@$(VENV)/bin/xcam explain \
	    "$$($(PY) -c 'import pathlib, skimage; print(pathlib.Path(skimage.__file__).parent / "data/chelsea.png")')" \
	    --model lite0 --methods gradcam gradcam_pp layercam --output demo

test: $(VENV)/.installed-test
	$(PY) -m pytest -n auto --maxprocesses 8 --dist worksteal $(PYTEST_ARGS)

# These tests need nothing but the library's own dependencies, and scikit-learn.
COMPUTING := $(addprefix tests/test_,$(addsuffix .py,battery habits split stateless transforms images errors plot))

test-lowest: RESOLUTION := lowest-direct
test-highest: RESOLUTION := highest
test-lowest test-highest: test-%: $(VENV)/.installed-dev
	$(VENV)/bin/uv venv --quiet --clear --python $(PY) $(VENV)-$*
	$(VENV)/bin/uv pip compile --quiet --resolution $(RESOLUTION) pyproject.toml --output-file $(VENV)-$*/versions.txt
	VIRTUAL_ENV=$(VENV)-$* $(VENV)/bin/uv pip install --quiet --requirement $(VENV)-$*/versions.txt \
	    pytest pytest-xdist hypothesis beartype scikit-learn
	PYTHONPATH=$(CURDIR) $(VENV)-$*/bin/python -m pytest -n auto --maxprocesses 8 --dist worksteal $(COMPUTING) $(PYTEST_ARGS)

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
