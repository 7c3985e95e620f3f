# make demo   a dataset of images with the bundled model, and its gallery, in out/demo
# make test   the tests
# make test-slow EXTRAS=test,parity   the slow ones: full size, long runs, further families and cases, many random kills
# make lint   ruff, as CI runs it
PYTHON ?= python3
EXTRAS ?= test
BIN := .venv/bin

.PHONY: demo test test-slow lint clean

demo: .venv/installed
	$(BIN)/jaxdiff generate --manifest configs/manifests/demo.jsonl --output out/demo
	$(BIN)/jaxdiff view out/demo --sheet out/demo/contact_sheet.png
	$(BIN)/jaxdiff view out/demo

test: .venv/installed-$(EXTRAS)
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: .venv/installed-$(EXTRAS)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m slow

lint: .venv/installed-$(EXTRAS)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf .venv out build *.egg-info

.venv/bin/pip:
	$(PYTHON) -m venv .venv

.venv/installed: pyproject.toml | .venv/bin/pip
	$(BIN)/pip install --quiet --editable .
	touch $@

.venv/installed-$(EXTRAS): pyproject.toml | .venv/bin/pip
	$(BIN)/pip install --quiet --editable ".[$(EXTRAS)]"
	touch .venv/installed $@
