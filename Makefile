# Everything runs in an environment of its own, made at the first call: .venv, or .venv-3.13 for `PYTHON=python3.13`.
PYTHON ?= python3
# A Python that pyenv has and that is not its default is found too.
INTERPRETER := $(shell $(PYTHON) -c 'import sys; print(sys.executable)' 2>/dev/null || \
	ls -d "$$(pyenv root 2>/dev/null)"/versions/*/bin/$(PYTHON) 2>/dev/null | tail -1)
VERSION := $(if $(INTERPRETER),$(shell $(INTERPRETER) -c 'import sys; print("%d.%d" % sys.version_info[:2])'))
VENV := .venv$(if $(filter-out python3,$(PYTHON)),-$(VERSION))
PY := $(VENV)/bin/python
CONSTRAINTS := $(wildcard constraints-$(VERSION).txt)
# LoFTR's own code lies beside: the other tests, and Ray's workers, run without torch, as they do at a user's.
PARITY := $(VENV)-parity
TORCH := $(shell grep '^torch==' constraints-3.11.txt)

.PHONY: train weights check test test-all parity torch faults starts clean

train: $(VENV)/ready
	$(PY) -m ifvit.train_all --preset quick --dataset_root synthetic

weights: $(VENV)/ready
	$(PY) -m ifvit.train_dense --preset cpu --dataset_root synthetic --config ifvit/weights/recipe.toml \
		--checkpoint_dir checkpoints/weights
	$(PY) -m ifvit.train_dense --preset cpu --dataset_root synthetic --config ifvit/weights/longer.toml \
		--set init=checkpoints/weights/dense_reg_ckpt --checkpoint_dir checkpoints/weights_longer
	$(PY) -m ifvit.train_dense --preset cpu --dataset_root synthetic --config ifvit/weights/longer.toml \
		--set synthetic_fingers=1000 --set zoom=0.35 --set num_epochs=10 --set seed=2 \
		--set init=checkpoints/weights_longer/dense_reg_ckpt --checkpoint_dir checkpoints/weights_longest
	$(PY) -m ifvit.weights pack checkpoints/weights_longest/dense_reg_ckpt

TESTS := -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

check: $(VENV)/ready
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) $(TESTS) -m "not slow and not process and not run"

test: $(VENV)/ready
	$(PY) $(TESTS) -m "not slow and not process"

test-all: $(VENV)/ready
	$(PY) $(TESTS) --durations 40 --durations-min 10

parity: $(PARITY)/ready
	$(PARITY)/bin/python -m pytest tests/models/test_parity.py

torch: $(PARITY)/torch

faults: $(VENV)/ready
	$(PY) tests/faults/kill.py --count 50 --inside 10
	$(PY) tests/faults/disk.py
	$(PY) tests/faults/sweep.py
	$(PY) tests/faults/hosts.py

starts:
	@test -n "$(VERSION)" || { echo "$(PYTHON) does not start; name another with PYTHON=…" >&2; exit 2; }

$(VENV)/ready: pyproject.toml $(CONSTRAINTS) | starts
	$(INTERPRETER) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check $(addprefix -c ,$(CONSTRAINTS)) -e '.[test,wsq]'
	touch $@

# What the tests' environment has is seen from this one. The build without CUDA or none: the other one is gigabytes.
$(PARITY)/torch: $(VENV)/ready
	$(INTERPRETER) -m venv $(PARITY)
	$(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > $(PARITY)/lib/python$(VERSION)/site-packages/tests.pth
	$(PARITY)/bin/python -m pip install --quiet --disable-pip-version-check '$(TORCH)' || { \
		echo "$(TORCH) cannot be installed here, so parity with LoFTR cannot be tested." >&2; exit 1; }
	touch $@

$(PARITY)/ready: $(PARITY)/torch pyproject.toml $(CONSTRAINTS)
	$(PARITY)/bin/python -m pip install --quiet --disable-pip-version-check $(addprefix -c ,$(CONSTRAINTS)) -e '.[parity]'
	touch $@

clean:
	rm -rf .venv .venv-* checkpoints
