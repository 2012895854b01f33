# Two commands do everything on a fresh machine:  make reproduce-<paper>   and   make test
PAPERS := ncl_pp dcp_nas fm_vit q_detr ap_fer q_vit iqa_attack adaptive_prune rbonn lifelong
STARTED := $(patsubst %/train.py,%,$(wildcard $(addsuffix /train.py,$(PAPERS))))

PYTHON ?= python3
VENV ?= .venv
# The environment's Python. `make test PY=python` uses the one that is active and installs nothing.
PY ?= $(VENV)/bin/python
BIN = $(if $(findstring /,$(PY)),$(dir $(PY)),)

SCALE ?= mini
DATA ?=
GPUS ?= 1
PER_RUN ?= 1
ONLY ?=
ALL ?=
DRY ?=
CELL ?=
NAME ?=
WEIGHTS ?=
RESULT ?=
ARGS ?=
JOBS ?= 2
# A value in double quotes for the shell, whatever is in it.
q = "$(subst `,\`,$(subst $$,\$$,$(subst ",\",$(subst \,\\,$1))))"
# One torch thread per worker.
PYTEST = OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS) --dist worksteal

# A notebook's backend is for the notebook; figures here go to files.
unexport MPLBACKEND
.DEFAULT_GOAL := help
.PHONY: help setup test lint format reproduce verify isa report check-runs bench faults clean
.PHONY: $(foreach t,test reproduce record verify isa evaluate compare bench logbook,$(addprefix $(t)-,$(PAPERS)))

help:
	@echo "make setup               the environment in $(VENV) (every target below does it first, once)"
	@echo "make test                all tests;  make test-<paper> those of one paper"
	@echo "make lint                format, ruff, types, import contracts, stale README tables;  make format mends the first two"
	@echo "make reproduce           the evidence of every paper, one after the other;  make reproduce-<paper> of one"
	@echo "                         SCALE=mini|full|real_<set>|gpu_<set>|paper  DATA=<folder of the data set>  ONLY=<claim>"
	@echo "                         SCALE=paper: GPUS=8 PER_RUN=8|1, DRY=1 prints the commands with estimated hours, DRY=measure"
	@echo "                         with hours from a step on this machine; ALL=1 or ONLY= starts them"
	@echo "make record-<paper>      copy the evidence of SCALE to <paper>/results/ and renew the README tables;"
	@echo "                         NAME=<you>: to <paper>/results/external/<you>/, a run of yours beside the record (make check-runs)"
	@echo "make verify-<paper>      run one recorded cell again and compare [CELL=<arm>/seed<k>];  make verify: of every paper"
	@echo "make isa                 one recorded cell of every paper with all instructions here and with AVX2 only;  make isa-<paper>"
	@echo "make report              the evidence of all papers as pages: runs/site/index.html"
	@echo "make logbook-<paper>     the evidence of a paper as an open logbook (Trackio), published by nobody but you"
	@echo "make compare-<paper>     RESULT=<run directory>: your numbers beside the record and the published ones"
	@echo "make evaluate-<paper>    WEIGHTS=<checkpoint> DATA=<folder>: the paper's metrics [ARGS='key=value ...']"
	@echo "make bench               speed ratios of every paper;  make bench-<paper> of one"
	@echo "make faults              kill, truncate and fill the disk under training runs (minutes, not in CI)"
	@echo "make clean               remove the environment and the caches, not the runs"
	@echo "papers: $(STARTED)"
	@echo "not started yet: $(or $(filter-out $(STARTED),$(PAPERS)),none)"

# ------------------------------------------------------------------------------------------------------- environment
ifeq ($(PY),$(VENV)/bin/python)
STAMP := $(VENV)/.complete
else
STAMP :=
endif

setup: $(STAMP)

$(VENV)/.complete: pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "error: no $(PYTHON) here; install Python 3.11 or newer, or make PYTHON=/path/to/python" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $$($(PYTHON) --version) is too old, Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "error: $(PYTHON) has no venv module; on Debian or Ubuntu: apt install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[deploy,dev]'
	@touch $@

# ------------------------------------------------------------------------------------------------------ test and lint
test: $(STAMP)
	$(PYTEST) $(ARGS)

lint: $(STAMP)
	$(BIN)ruff format --check .
	$(BIN)ruff check .
	$(BIN)pyright --pythonpath "$$($(PY) -c 'import sys; print(sys.executable)')"
	$(BIN)lint-imports --config ci/importlinter.ini
	$(PY) -m common.metrics.report --readme --check

format: $(STAMP)
	$(BIN)ruff format .
	$(BIN)ruff check --fix .

faults: $(STAMP)
	$(PYTEST) -m faults ci/test_faults.py $(ARGS)

# --------------------------------------------------------------------------------------------------------- one paper
started = @test -f $*/train.py || { echo "error: $* is not started yet; papers here: $(STARTED)" >&2; exit 1; }

$(addprefix test-,$(PAPERS)): test-%: $(STAMP)
	$(started)
	PAPER=$* $(PYTEST) $*/tests ci/test_loop.py ci/test_command_lines.py $(ARGS)

$(addprefix reproduce-,$(PAPERS)): reproduce-%: $(STAMP)
	$(started)
	@$(PY) -m common.reproduce run $* --scale $(SCALE) --data $(call q,$(DATA)) --gpus $(GPUS) --per-run $(PER_RUN) --only "$(ONLY)" $(if $(ALL),--all) $(if $(DRY),--dry $(if $(filter measure,$(DRY)),measure,estimate))

$(addprefix record-,$(PAPERS)): record-%: $(STAMP)
	$(started)
	@$(PY) -m common.reproduce record $* --scale $(SCALE) --name $(call q,$(NAME))

$(addprefix verify-,$(PAPERS)): verify-%: $(STAMP)
	$(started)
	@$(PY) -m common.reproduce verify $* --scale $(SCALE) --data $(call q,$(DATA)) --cell $(call q,$(CELL))

$(addprefix isa-,$(PAPERS)): isa-%: $(STAMP)
	$(started)
	@$(PY) -m common.instruction_sets $* --scale $(SCALE) --data $(call q,$(DATA))

$(addprefix evaluate-,$(PAPERS)): evaluate-%: $(STAMP)
	$(started)
	@test -n $(call q,$(WEIGHTS)) || { echo "error: make $@ WEIGHTS=<checkpoint> [DATA=<folder>]" >&2; exit 1; }
	@$(PY) -m common.reproduce evaluate $* --weights $(call q,$(WEIGHTS)) --data $(call q,$(DATA)) --args $(call q,$(ARGS))

$(addprefix compare-,$(PAPERS)): compare-%: $(STAMP)
	$(started)
	@$(PY) -m common.reproduce compare $* $(call q,$(RESULT))

$(addprefix bench-,$(PAPERS)): bench-%: $(STAMP)
	$(started)
	@$(PY) -m common.reproduce bench $* --args $(call q,$(ARGS))

# --------------------------------------------------------------------------------------------------------- all papers
reproduce verify: $(STAMP)
	@$(PY) -m common.everything $@ --scale $(SCALE)

check-runs: $(STAMP)
	@$(PY) -m common.submission

report: $(STAMP)
	@$(PY) -m common.metrics.site

$(addprefix logbook-,$(PAPERS)): logbook-%: $(STAMP)
	@$(PY) -m common.metrics.logbook $*

bench: $(addprefix bench-,$(STARTED))

isa: $(addprefix isa-,$(STARTED))

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis .import_linter_cache *.egg-info
	find . -name __pycache__ -not -path './$(VENV)/*' -type d -prune -exec rm -rf {} +
