# make             list the targets
# make train       run the first experiment, from installation to a text sample
#
# .venv is built on first use and rebuilt when requirements.txt changes. For another Python: make PYTHON=python3.12 train

PYTHON ?= python3
# Relative paths and `python -m` work in a folder whose path has spaces, and after the folder is moved.
PY := .venv/bin/python
READY := .venv/.installed
NUMERICS := tests/test_layers.py tests/test_quant.py tests/test_optim.py tests/test_compressed.py

.PHONY: help train test check peers bench results faults

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' Makefile

train: $(READY) ## data, a small 1-bit GPT on Python code, its loss curve and a sample
	$(PY) data/pycode/prepare.py
	$(PY) train_gpt.py config/pycode_bin.py --resume=auto
	$(PY) plot.py loss out/pycode_bin
	$(PY) sample.py --ckpt=out/pycode_bin/best.pt --num_samples=1

test: $(READY) ## linter and tests, on the CPU; Triton, for its interpreter, is installed where it can be
	@$(PY) -c 'import triton' 2>/dev/null || $(PY) -m pip install --quiet --disable-pip-version-check triton || true
	$(PY) -m ruff check .
	$(PY) -m pytest -n auto --dist loadfile
	NANOBIT_PATHS=gpu $(PY) -m pytest -n auto --dist loadfile tests/test_layers.py tests/test_compressed.py

check: $(READY) ## the numerics of layers, quantizers and optimizers; run it after you edit a layer
	$(PY) -m pytest $(NUMERICS)
	NANOBIT_PATHS=gpu $(PY) -m pytest $(NUMERICS)

peers: $(READY) ## other implementations that tests and bench.py compare with
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-peers.txt

bench: $(READY) ## time and memory of a training step
	$(PY) bench.py train

results: $(READY) ## the GPT runs behind the first rows of the README's table
	$(PY) results/runs.py quality

faults: $(READY) ## kills, full disks, NaNs, damaged files on the four trainers, 10 minutes on 2 cores
	$(PY) results/faults.py

# .unfinished exists during the whole install. If a later run still finds it, the install was interrupted and starts over:
# pip alone would take a half-unpacked package for an installed one. Renaming keeps the file's time, so a
# requirements.txt edited during the install is newer and is read again. A .venv made by hand is completed, not replaced.
$(READY): requirements.txt
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10) and \
		"error: Python 3.10 or newer is needed; type: make PYTHON=python3.12 ...")'
	@if [ -e .venv/.unfinished ]; then rm -rf .venv; fi
	@echo 'installing requirements.txt into .venv: the first time takes minutes, torch is large'
	@mkdir -p .venv && touch .venv/.unfinished
	@if [ ! -x $(PY) ]; then "$(PYTHON)" -m venv .venv; fi
	@$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@mv .venv/.unfinished $@
