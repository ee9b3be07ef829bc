# `make help` lists the targets. Everything runs in .venv, which the first target that needs it creates.
PYTHON ?= python3
# CONSTRAINTS=constraints-oldest.txt: the oldest torch that is supported in place of the newest.
CONSTRAINTS ?= constraints.txt
VENV := .venv
BIN := $(VENV)/bin
TRAINABLE := $(VENV)/.trainable
INSTALLED := $(VENV)/.installed
ZOO := $(VENV)/zoo
PURELIB := -c 'import sysconfig; print(sysconfig.get_path("purelib"))'

# Idle OpenMP threads soon sleep instead of spinning: where other work runs beside it, spinning makes a
# step up to twice as slow; on a quiet machine this costs an eighth.
export GOMP_SPINCOUNT ?= 1000

.DEFAULT_GOAL := help
.PHONY: help install train reproduce test test-slow docs docs-serve trust licenses audit-deps lint audit bench \
  bench-full zoo hub-kernels release-check clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

PIP_INSTALL = $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check --constraint $(CONSTRAINTS) --editable

$(VENV)/bin/activate:
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.exit(0 if sys.version_info >= (3, 10) else "Python " + v + " is too old: fastsfvae needs 3.10 or newer (make PYTHON=python3.12 ...)")'
	$(PYTHON) -m venv $(VENV)

# What `make train` needs by itself, so that a newcomer waits for nothing else.
$(TRAINABLE): pyproject.toml $(CONSTRAINTS) | $(VENV)/bin/activate
	$(PIP_INSTALL) '.[train]'
	@touch $@

$(INSTALLED): pyproject.toml $(CONSTRAINTS) | $(VENV)/bin/activate
	$(PIP_INSTALL) '.[dev]'
	@touch $(TRAINABLE) $@

install: $(INSTALLED) ## Create .venv with everything that the other targets need

train: $(TRAINABLE) ## Train a sampling-free VAE on the bundled digits; results go to runs/
	$(BIN)/fastsfvae train

reproduce: $(INSTALLED) ## Make quick versions of Table 4, Figure 2 and the neighbours; results go to runs/paper/
	$(BIN)/fastsfvae reproduce table4 --quick
	$(BIN)/fastsfvae reproduce figure2 --quick
	$(BIN)/fastsfvae reproduce neighbours --quick

# In two processes at once, as neither keeps two cores busy: the second takes the interpreter's tests, and
# of the others as many folders as make both take about as long. Its output comes behind the first's.
BESIDE := tests/bench tests/cli tests/training
PYTEST = $(BIN)/python -m pytest $(if $(TURN),--turn $(TURN))
define RUN_TESTS
@log=$$(mktemp); beside() { \
  TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(PYTEST) -m 'interpreter and $(SPEED)' -p no:cacheprovider; one=$$?; \
  $(PYTEST) -m '$(SPEED)' -p no:cacheprovider $(BESIDE); other=$$?; \
  [ $$((one + other)) = 0 ]; }; \
beside > $$log 2>&1 & second=$$!; \
$(PYTEST) -m '$(SPEED)' $(addprefix --ignore=,$(BESIDE)); first=$$?; \
wait $$second; second=$$?; echo 'In the interpreter, then $(BESIDE):'; cat $$log; rm $$log; \
exit $$((first + second))
endef

test: SPEED := not slow
test: $(INSTALLED) ## Run the quick tests, and beside them the Triton kernels' again in the interpreter
	$(RUN_TESTS)

test-slow: SPEED := slow
test-slow: $(INSTALLED) ## Run all other tests in the same way; TURN=2/8: the second of eight parts of them
	$(RUN_TESTS)

# Its theme warns of a successor of MkDocs at every build.
docs docs-serve: export NO_MKDOCS_2_WARNING = 1
docs: $(INSTALLED) ## Build the site of docs/ in build/site; a broken link or docstring fails
	$(BIN)/mkdocs build --quiet

docs-serve: $(INSTALLED) ## Show the site on http://127.0.0.1:8000 while you write
	$(BIN)/mkdocs serve

trust: $(INSTALLED) ## Look for what breaks: random decoders, hostile numbers, kills, long runs
	$(BIN)/python -m tests.trust --out bench/results/trust.md

licenses: $(INSTALLED) ## Print the licence of everything that is installed; fail on an unknown one
	$(BIN)/python tests/licenses.py

# Asks a database of known vulnerabilities, so it needs a network, unlike every other target but the first.
audit-deps: $(INSTALLED) ## Look for known vulnerabilities in what is installed (needs a network)
	$(BIN)/python -m pip install --quiet pip-audit
	$(BIN)/pip-audit --skip-editable

lint: $(INSTALLED) ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy fastsfvae
	$(BIN)/pyright --pythonpath $(BIN)/python

audit: $(INSTALLED) ## Compile every kernel configuration for sm_75 to sm_120; hold the machine code to its bounds
	$(BIN)/python -m fastsfvae.kernels.audit
	$(BIN)/python -m fastsfvae.kernels.audit --code

bench: $(INSTALLED) ## Time every operation against its peers here, in about five minutes; rows go to the ledger
	$(BIN)/python -m pytest bench --benchmark-only -rs --ledger bench/results/ledger.csv

bench-full: $(INSTALLED) ## The same for every workload, with the peak memory of each
	$(BIN)/python -m pytest bench --benchmark-only -rs --full --ledger bench/results/ledger.csv

# In an environment inside the other, whose packages it borrows: what the zoo needs changes nothing there.
$(ZOO)/.installed: $(INSTALLED)
	$(PYTHON) -m venv $(ZOO)
	$(BIN)/python $(PURELIB) > "$$($(ZOO)/bin/python $(PURELIB))/outer.pth"
	$(ZOO)/bin/python -m pip install --quiet --no-compile --disable-pip-version-check --constraint $(CONSTRAINTS) --editable '.[zoo]'
	@touch $@

zoo: $(ZOO)/.installed ## Run decoders of public packages against reverse mode; write bench/results/zoo.md
	$(ZOO)/bin/python -m bench.zoo --jobs 2

hub-kernels: $(INSTALLED) ## Write gram_project and woodbury as a kernel of the Hugging Face hub, to build/hub/
	rm -rf build/hub/gram-woodbury
	$(BIN)/python -m fastsfvae.kernels.hub

# The wheel comes into an environment of its own, with torch: some minutes and 6 GB, removed afterwards.
RELEASE := build/release
release-check: $(INSTALLED) ## Build sdist and wheel, check them, install the wheel elsewhere and run the quick start
	rm -rf $(RELEASE)
	$(BIN)/python -m build --no-isolation --outdir $(RELEASE)/dist
	$(BIN)/twine check --strict $(RELEASE)/dist/*
	$(PYTHON) -m venv $(RELEASE)/venv
	$(RELEASE)/venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS) \
	  "$$(ls $(RELEASE)/dist/*.whl)[train]"
	cd $(RELEASE) && venv/bin/python ../../tests/quick_start.py && venv/bin/fastsfvae train --steps 50 --out run
	rm -rf $(RELEASE)/venv
	@ls -l $(RELEASE)/dist

clean: ## Remove caches and builds (never runs/ or .venv)
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -path ./$(VENV) -prune -o -name __pycache__ -prune -exec rm -rf {} +
