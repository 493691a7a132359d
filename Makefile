# make book | make test | make concept CONCEPT=17 | make help
PROFILE ?= profiles/mini.yaml
override PROFILE := $(if $(findstring /,$(PROFILE)),$(PROFILE),profiles/$(PROFILE:.yaml=).yaml)
CLUSTER ?= local
SHARDS ?= 1
PYTHON ?= python3
CORES ?= $(shell getconf _NPROCESSORS_ONLN)
RUN = runs/$(basename $(notdir $(PROFILE)))
BIN = .venv/bin
SNAKEMAKE = PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/snakemake --config profile=$(PROFILE) shards=$(SHARDS) threads=$(CORES) --workflow-profile cluster/$(CLUSTER) --cores $(CORES) \
	--quiet rules progress host reason --max-checksum-file-size 1000000000 --

.PHONY: help book test test-slurm concept fetch unlock lint clean

help:
	@echo "make book                     execute the notebooks and render the book  [PROFILE=profiles/mini.yaml]"
	@echo "make concept CONCEPT=17       add the page of a concept to the book; or GENE=LYZ, or CELL_TYPE=\"CD19+ B\""
	@echo "make book CLUSTER=slurm SHARDS=16 CORES=8   the same as jobs of a cluster: see book/cluster.md"
	@echo "make fetch PROFILE=atlas      get the cells, the model and the texts that a profile names"
	@echo "make test                     run the tests"
	@echo "make test-slurm               run the tiny profile through a SLURM on this machine (needs slurm-wlm, munge, root)"
	@echo "make lint                     check the style of the code"
	@echo "make unlock                   let a run start again in a folder whose last run was killed"
	@echo "make clean                    delete all runs and books (not .venv)"

# The packages, in the exact versions of constraints.txt.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info[:2] >= (3, 11) else "Python 3.11 or newer is needed; this is " + sys.version.split()[0] + ". Try make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable .
	touch $@

.venv/installed-test: .venv/installed
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps scgpt==0.2.4  # the genuine package, as an oracle
	touch $@

.venv/installed-fetch: .venv/installed
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[fetch]'
	touch $@

.venv/installed-cluster: .venv/installed
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[cluster]'
	touch $@

# Kept out of the way of who needs none of it.
ifneq ($(CLUSTER),local)
book concept: .venv/installed-cluster
endif

book: .venv/installed
	@$(SNAKEMAKE) book
	@echo "The book: $(CURDIR)/$(RUN)/book/index.html"

concept: .venv/installed
	@test -n "$(CONCEPT)$(GENE)$(CELL_TYPE)" || { echo 'error: say which concept: make concept CONCEPT=17, GENE=LYZ or CELL_TYPE="CD19+ B"'; exit 1; }
	@$(SNAKEMAKE) $(RUN)/concepts.h5ad
	@number=$$($(BIN)/python -m scsae_utils.book concept --run $(RUN) --concept "$(CONCEPT)" --gene "$(GENE)" --cell-type "$(CELL_TYPE)") \
		&& $(SNAKEMAKE) $(RUN)/notebooks/concepts/concept_$$number.ipynb \
		&& $(SNAKEMAKE) book \
		&& echo "The page: $(CURDIR)/$(RUN)/book/notebooks/concepts/concept_$$number.html"

fetch: .venv/installed-fetch
	@$(BIN)/python -m scsae_utils.fetch --profile $(PROFILE)

test-slurm: .venv/installed-cluster
	$(BIN)/python tools/slurm_test.py

test: .venv/installed-test
	$(BIN)/python -m pytest

lint: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

unlock: .venv/installed
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/snakemake --config profile=$(PROFILE) --cores 1 --unlock

clean:
	rm -rf runs
