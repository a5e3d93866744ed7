# Everything runs in an environment of its own, .venv, made at the first call.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python

.PHONY: train test test-all faults clean

train: $(VENV)/ready
	$(PY) -m ifvit.train_all --preset quick --dataset_root synthetic

TESTS := -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test: $(VENV)/ready
	$(PY) $(TESTS) -m "not slow"

test-all: $(VENV)/ready
	$(PY) $(TESTS)

faults: $(VENV)/ready
	$(PY) tests/faults/kill.py --count 50 --inside 10
	$(PY) tests/faults/disk.py
	$(PY) tests/faults/sweep.py
	$(PY) tests/faults/hosts.py

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,wsq]'
	touch $@

clean:
	rm -rf $(VENV) checkpoints
