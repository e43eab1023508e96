# make demo    draw a small data set, adapt a frozen ViT to it and show what is skipped
# make test    run the tests, two at a time; PYTEST_ARGS='-m slow', say, chooses others, WORKERS=8 runs 8 at a time
# make test-core  run the tests of core, parts and adapt in an environment that has torch and pytest and nothing else
# make docs    make a site of docs/ and the docstrings in build/site; needs Python 3.11 or later
# make lint    check the code's style
# make clean   remove the virtual environment and all caches
#
# Each does its own set-up in .venv; it needs Python 3.10 to 3.13 with pip, and a network. PYTHON=python3.12 chooses
# another interpreter, PIP_ARGS='--extra-index-url https://download.pytorch.org/whl/cpu' a torch without CUDA.

PYTHON ?= python3
WORKERS ?= 2
VENV_PYTHON := .venv/bin/python
STAMP := .venv/.installed
CORE_STAMP := .venv-core/.installed
DOCS_STAMP := .venv/.installed-docs

define WRONG_PYTHON
mmdyt needs Python 3.10, 3.11, 3.12 or 3.13, and `$(PYTHON)` is none of these: $(shell $(PYTHON) --version 2>&1)
Name one that is: make $(MAKECMDGOALS) PYTHON=python3.11
endef

define NO_VENV
`$(PYTHON) -m venv` failed. On Debian and Ubuntu, install the package python3-venv (or python3.11-venv, as the version is).
endef

define INSTALL_FAILED

The installation failed; pip's message above says where. What helps, by cause:
  network   behind a proxy set HTTPS_PROXY; for a mirror set PIP_INDEX_URL
  disk      the environment with torch's CUDA libraries takes 10 GB here and in the temporary folder (TMPDIR)
  platform  video needs decord, which has wheels for x86-64 Linux and Windows only
  other     delete the folder .venv and try again
endef
export WRONG_PYTHON NO_VENV INSTALL_FAILED

.PHONY: demo test test-core docs lint clean

demo: $(STAMP)
	$(VENV_PYTHON) tools/demo.py

test: $(STAMP)
	$(VENV_PYTHON) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

test-core: $(CORE_STAMP)
	.venv-core/bin/python -m pytest tests/core tests/parts tests/adapting $(PYTEST_ARGS)

docs: $(DOCS_STAMP)
	rm -rf build/site docs/api
	$(VENV_PYTHON) -m sphinx --fail-on-warning --keep-going -d build/doctrees docs build/site

lint: $(STAMP)
	$(VENV_PYTHON) -m ruff check mmdyt tools tests configs docs setup.py
	$(VENV_PYTHON) -m ruff format --check mmdyt tools tests docs/*.py setup.py

clean:
	rm -rf .venv .venv-core build docs/api *.egg-info .pytest_cache .ruff_cache
	find mmdyt tools tests docs -name __pycache__ -prune -exec rm -rf {} +

$(VENV_PYTHON):
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null \
		|| { echo "$$WRONG_PYTHON"; exit 1; }
	@$(PYTHON) -m venv .venv || { rm -rf .venv; echo "$$NO_VENV"; exit 1; }

$(CORE_STAMP): constraints.txt
	@$(PYTHON) -m venv .venv-core || { echo "$$NO_VENV"; exit 1; }
	@.venv-core/bin/python -m pip install $(PIP_ARGS) -c constraints.txt torch pytest || { echo "$$INSTALL_FAILED"; exit 1; }
	@touch $@

$(DOCS_STAMP): $(STAMP)
	@$(VENV_PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo 'make docs needs Python 3.11 or later: make clean, then make docs PYTHON=python3.11'; exit 1; }
	@$(VENV_PYTHON) -m pip install $(PIP_ARGS) -c constraints.txt -e '.[docs]' || { echo "$$INSTALL_FAILED"; exit 1; }
	@touch $@

# Without the system's libGL the usual OpenCV cannot be loaded; its headless twin can.
$(STAMP): setup.py constraints.txt | $(VENV_PYTHON)
	@rm -f $@
	@echo 'Installing mmdyt and what it needs into .venv: about 3 GB to download, several minutes.'
	@$(VENV_PYTHON) -m pip install $(PIP_ARGS) -c constraints.txt -e '.[cls,seg,video,lite,test]' \
		|| { echo "$$INSTALL_FAILED"; exit 1; }
	@$(VENV_PYTHON) -c 'import cv2' 2>/dev/null || { \
		$(VENV_PYTHON) -m pip uninstall -y opencv-python opencv-contrib-python \
		&& $(VENV_PYTHON) -m pip install $(PIP_ARGS) -c constraints.txt opencv-contrib-python-headless; } \
		|| { echo "$$INSTALL_FAILED"; exit 1; }
	@touch $@
