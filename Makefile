# Every target starts from a bare clone and needs python3 (3.11 or later) and make, nothing else: it makes .venv,
# installs what it uses, and runs. What is installed is not installed again until pyproject.toml changes.

PYTHON ?= python3
WORKERS ?= 2
PIP_FLAGS ?= -q

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check --no-input

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help quickstart test long parity exports table check format bench plans notebooks docs hooks clean distclean FORCE

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /  make \1 | /p' Makefile | awk -F'|' '{printf "%-18s %s\n", $$1, $$2}'

# --- what the targets run

quickstart: $(VENV)/.has-core ## train a small GPT-J on Python's own sources, then let it write
	$(PY) -m train --gin_file=configs/quickstart.gin
	$(PY) -m inference --checkpoint runs/quickstart --prompt "def main(" --temperature 0.8

test: $(VENV)/.has-dev ## the test suite, on 8 simulated devices (PYTEST="-k name" chooses)
	JAX_PLATFORMS=cpu $(PY) -m pytest -n $(WORKERS) --dist worksteal --ignore=tests/parity -m "not long" $(PYTEST)

long: $(VENV)/.has-dev ## what takes long: every family's training step on every kind of mesh, several processes
	JAX_PLATFORMS=cpu $(PY) -m pytest -n $(WORKERS) --dist worksteal --ignore=tests/parity -m long -o faulthandler_timeout=1800 $(PYTEST)

parity: $(VENV)/.has-parity ## the models against transformers (torch)
	JAX_PLATFORMS=cpu $(PY) -m pytest -n $(WORKERS) --dist worksteal tests/parity $(PYTEST)

exports: $(VENV)/.has-parity ## what to_hf writes, opened by transformers 5 in an environment of its own
	@test -e .cache/venv5/.has-v5 || { echo "installing transformers 5 into .cache/venv5"; \
	  $(PY) -m venv .cache/venv5 && .cache/venv5/bin/python -m pip install $(PIP_FLAGS) torch==2.13.0 "transformers>=5,<6" \
	  && touch .cache/venv5/.has-v5; }
	rm -rf .cache/exports
	JAX_PLATFORMS=cpu $(PY) -m tests.parity.make_exports .cache/exports
	.cache/venv5/bin/python tests/parity/exported.py .cache/exports

table: $(VENV)/.has-core ## write the README's table of models (after FLAXTRON_RECORD=1 make parity)
	$(PY) docs/model_table.py

check: $(VENV)/.has-dev ## ruff and pyright
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m pyright --warnings

format: $(VENV)/.has-dev ## mend what ruff can mend
	$(PY) -m ruff check --fix
	$(PY) -m ruff format

bench: $(VENV)/.has-parity ## side by side with transformers, as ratios
	$(PY) -m benchmarks

plans: $(VENV)/.has-tpu ## compile every shipped plan for its TPU slice (no TPU needed; an hour) and check that it fits
	JAX_PLATFORMS=cpu $(PY) -m benchmarks.plans

notebooks: $(VENV)/.has-notebooks ## execute every notebook; the results lie in .cache/notebooks
	@mkdir -p .cache/notebooks
	printf '%s\n' notebooks/*.ipynb | xargs -n 1 -P $(WORKERS) $(VENV)/bin/jupyter-execute --kernel_name=python3 \
	  --timeout=1200 --output='$(CURDIR)/.cache/notebooks/{notebook_name}'

docs: $(VENV)/.has-docs ## build the site into .cache/site, warnings as errors, and run every code block of its pages
	rm -rf .cache/site
	JAX_PLATFORMS=cpu $(PY) -m sphinx -q -E -a -W --keep-going -c docs -d .cache/doctrees . .cache/site
	JAX_PLATFORMS=cpu $(PY) -m pytest -n $(WORKERS) --dist worksteal tests/docs/pages.py -o faulthandler_timeout=1800 $(PYTEST)

hooks: $(VENV)/.has-dev ## check every commit before it is made
	$(PY) -m pre_commit install

clean: ## drop caches; your runs/ and .venv stay
	rm -rf .cache .pytest_cache .ruff_cache build dist flaxtron.egg-info $(VENV).old
	find modelzoo parallel train inference tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## drop .venv too
	rm -rf $(VENV)

# --- the environment
# A stamp is written only after its step succeeded. While a step changes .venv, BUSY holds its process id: whoever finds
# it without that process knows that the step was cut off, and builds .venv again.

BUSY := $(VENV)/.busy
WHOLE := test ! -e $(BUSY) && $(PY) -c 'import pip' 2>/dev/null

INSTALL_core := .
INSTALL_dev := '.[dev]'
INSTALL_notebooks := '.[notebooks]'
INSTALL_docs := '.[docs]'
INSTALL_tpu := '.[tpu]'
# One torch for everybody, the one that the tolerances were measured with.
INSTALL_parity := '.[dev,parity,eval]' accelerate torch==2.13.0

define PYTHON_IS_FIT
import sys
if sys.version_info < (3, 11):
    sys.exit("flaxtron needs Python 3.11 or later and %s is %d.%d: make PYTHON=python3.12 ..." % (sys.executable, *sys.version_info[:2]))
try:
    import ensurepip, venv
except ImportError:
    sys.exit("%s cannot make a virtual environment (no ensurepip): on Debian or Ubuntu, apt install python3-venv" % sys.executable)
endef
export PYTHON_IS_FIT

ifneq ($(shell $(WHOLE) && echo yes),yes)
$(VENV)/.made: FORCE
endif
$(VENV)/.made:
	@if $(WHOLE); then touch $@; exit; fi; \
	if test -s $(BUSY) && kill -0 "$$(cat $(BUSY))" 2>/dev/null; then \
	  echo "another make is installing into $(VENV); if not, remove $(BUSY)" >&2; exit 1; fi; \
	command -v $(PYTHON) >/dev/null || { echo "no $(PYTHON) found: make PYTHON=/path/to/python3 ..." >&2; exit 1; }; \
	$(PYTHON) -c "$$PYTHON_IS_FIT" || exit 1; \
	echo "making $(VENV)"; \
	rm -rf $(VENV).old; test ! -e $(VENV) || mv $(VENV) $(VENV).old; rm -rf $(VENV).old; \
	mkdir $(VENV) && echo $$$$ > $(BUSY) && $(PYTHON) -m venv $(VENV) && touch $@ && rm $(BUSY)

# A failed download leaves .venv as it was; only an interrupted installation leaves BUSY behind.
$(VENV)/.has-core $(VENV)/.has-dev $(VENV)/.has-docs $(VENV)/.has-notebooks $(VENV)/.has-parity $(VENV)/.has-tpu: $(VENV)/.has-%: pyproject.toml $(VENV)/.made
	@trap 'exit 130' INT TERM HUP; \
	echo "installing $(INSTALL_$*) (a minute or two the first time)"; \
	echo $$$$ > $(BUSY); \
	$(PIP) install $(PIP_FLAGS) --root-user-action=ignore -e $(INSTALL_$*); result=$$?; \
	rm $(BUSY); test $$result = 0 && touch $@
