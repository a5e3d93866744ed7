# Everything runs in an environment of its own, .venv, made at the first call.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python

.PHONY: train test faults clean

train: $(VENV)/ready
	$(PY) -m ifvit.train_all --preset quick --dataset_root synthetic

# One process more than cores, up to four: they wait for test beds and sweeps a third of their time.
test: $(VENV)/ready
	$(PY) -m pytest -n $(shell $(PYTHON) -c 'import os; print(min(4, 1 + (os.cpu_count() or 1)))') --dist loadfile --no-loadscope-reorder

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
