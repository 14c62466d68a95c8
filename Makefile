# Everything runs in .venv, which the first target makes. Needs Python 3.11 or later, git and make.
#
#   make demo                 compile two TTT language models, show what the compiler did, compare
#   make test                 lint and tests
#   make speed                the torch backend against the naive loop on an idle CPU
#   make docs                 the documentation as a site, in build/docs
#   make bench                what benchmarks/results records, on the GPU at hand, and the tables made of it
#   make bench-scans          a part of it: scans, memory, rules, models, compile-time or picked; OPTIONS='...' of its script
#   make CONSTRAINTS= demo    with the newest torch instead of the tested one (a CUDA build, say)
#   make PYTHON=python3.12    another interpreter
#   make PEERS= RUN=python3 bench   with what is installed: nothing is fetched

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
RUN := $(VENV)/bin/python
RECORD := benchmarks/results/$(shell date +%F)
PARTS := scans memory rules models compile-time picked
PEERS := $(VENV)/peers-installed

.PHONY: demo test speed lint format bench $(PARTS:%=bench-%) docs clean
.NOTPARALLEL:  # what is timed has the machine to itself

demo: $(VENV)/installed
	$(RUN) -m tttc demo

test: lint
	$(RUN) -m pytest -n 2 --ignore=tests/test_speed.py

# By itself: a comparison of times needs the machine to itself.
speed: $(VENV)/installed
	$(RUN) -m pytest -s tests/test_speed.py

bench: $(PARTS:%=bench-%)
	$(RUN) benchmarks/plots.py
	$(RUN) benchmarks/tables.py

bench-scans: $(PEERS)
	$(RUN) benchmarks/scan_forward.py $(RECORD)-scans.json $(OPTIONS)

bench-memory: $(PEERS)
	$(RUN) benchmarks/memory.py $(RECORD)-memory.json $(OPTIONS)

bench-rules: $(PEERS)
	$(RUN) benchmarks/rules.py $(RECORD)-rules.json $(OPTIONS)

bench-models: $(PEERS)
	$(RUN) benchmarks/models.py $(RECORD)-models.json $(OPTIONS)

bench-compile-time: $(PEERS)
	$(RUN) benchmarks/compile_time.py $(RECORD)-compile-time.json $(OPTIONS)

# Goes on where an earlier run with the same RECORD (that is, of the same day) ended.
bench-picked: $(PEERS)
	$(RUN) benchmarks/schedules.py $(RECORD)-picked.json $(or $(OPTIONS),--seconds 3600)

# mamba-ssm has no wheel: it is built for the GPU at hand, and left out where that fails, until the next time.
$(VENV)/peers-installed: $(VENV)/installed
	$(RUN) -m pip install $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) -e '.[bench,plot]'
	-$(RUN) -m pip install setuptools wheel packaging ninja einops transformers
	-PATH="$(CURDIR)/$(VENV)/bin:$$PATH" PYTORCH_NVCC=$(CURDIR)/benchmarks/nvcc_here.sh MAMBA_FORCE_BUILD=TRUE CAUSAL_CONV1D_FORCE_BUILD=TRUE \
		$(RUN) -m pip install --no-build-isolation --no-deps causal-conv1d mamba-ssm
	if $(RUN) -m pip show --quiet mamba-ssm; then touch $@; fi

docs: $(VENV)/installed
	$(RUN) -m sphinx -W --keep-going -b html docs build/docs

lint: $(VENV)/installed
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

format: $(VENV)/installed
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

$(VENV)/installed: pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed; name one with PYTHON=")'
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
