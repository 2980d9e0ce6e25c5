# Two commands do everything on a fresh machine: `make train` and `make test`.
PYTHON ?= python3
VENV   := .venv
PIP    := $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: train test lint clean

train: $(VENV)/.installed
	$(VENV)/bin/gradbits train --data digits --model small_cnn --model-set width=32 --compare fp32,bf16,int8_dynamic,unified_int8 --out runs/first --overwrite

test: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/python -m pytest

lint: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

# The native kernels are part of the install: it runs again when their sources change.
NATIVE := setup.py $(wildcard gradbits/kernels/native/*.cpp gradbits/kernels/native/*.inl gradbits/kernels/native/*.h)

# torch goes first and pinned: a package that depends on it must find it there, not fetch another build.
$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch numpy
	touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml $(NATIVE)
	$(PIP) -e '.[plot]'
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
