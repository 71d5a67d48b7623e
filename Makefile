# make quickstart   a real comparison in a minute or two: 3 strategies x 2 seeds on handwritten digits
#                   TORCH=cpu installs PyTorch without CUDA: 0.2 GB instead of several, for a machine without a GPU
# make test         the test suite
# make lint         style and types
# make lists        everything that lists methods and architectures: pages, tables, missing golden traces
# make screenshots  the pictures of docs/images, from 24 short runs (minutes; needs Chromium)
# make bench        speed, side by side with plain PyTorch
# make wheel        dist/mtl-….whl, which pip installs anywhere: the command mtl-train, with conf/ inside
# All of them create .venv on first use and are safe to repeat. PYTHON=python3.12 chooses the interpreter (3.10 to 3.13).
PYTHON ?= python3
VENV := .venv/bin
# TORCH=cpu, or a version of CUDA such as TORCH=cu126: the folder of PyTorch's own index. Empty: as PyPI has it.
TORCH ?=

.PHONY: quickstart test bench wheel lint lists screenshots
quickstart: .venv/installed
	$(VENV)/python train.py -m experiment=quickstart loss=equal,uncertainty,pcgrad seed=0,1
	@echo "first:    source .venv/bin/activate   (once in each terminal, for all commands that start with python)"

test: .venv/installed-test
	OMP_NUM_THREADS=1 $(VENV)/python -m pytest -n 2 --dist loadfile

lists: .venv/installed-test
	$(VENV)/python -m mtl.certify
	GOLDEN=missing OMP_NUM_THREADS=1 $(VENV)/python -m pytest -q tests/test_golden.py tests/test_golden_variants.py

screenshots: .venv/installed
	OMP_NUM_THREADS=1 $(VENV)/python benchmarks/screenshots.py

bench: .venv/installed
	$(VENV)/python benchmarks/throughput.py

# setuptools never empties build/: a module that was renamed since would still be in the wheel.
wheel: .venv/bin/pip
	rm -rf build
	$(VENV)/pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .
	@ls dist/*.whl

lint: .venv/installed-lint
	$(VENV)/ruff check .
	$(VENV)/ruff format --check .
	$(VENV)/pyrefly check --python-interpreter-path $(VENV)/python --summary=none

.venv/bin/pip:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 10) <= v < (3, 14) else f"error: Python 3.10 to 3.13 is needed, {sys.executable} is {v[0]}.{v[1]}; try: make PYTHON=python3.12")'
	@$(PYTHON) -m venv .venv || { rm -rf .venv; echo "error: python3 -m venv failed; on Debian or Ubuntu: apt install python3-venv"; exit 1; }

# The stamps are written last, so an interrupted installation is simply done again.
.venv/installed: .venv/bin/pip pyproject.toml
	@echo "installing into .venv (PyTorch is several GB on the first time; make TORCH=cpu for a machine without a GPU)"
ifneq ($(TORCH),)
	$(VENV)/pip install --disable-pip-version-check --index-url https://download.pytorch.org/whl/$(TORCH) torch torchvision
endif
	$(VENV)/pip install --disable-pip-version-check -e .
	@touch $@

.venv/installed-test: .venv/installed
	$(VENV)/pip install --disable-pip-version-check -e '.[test]'
	@touch $@

# After the tests' packages: the checker sees all that the code may import.
.venv/installed-lint: .venv/installed-test
	$(VENV)/pip install --disable-pip-version-check -e '.[lint]'
	@touch $@
