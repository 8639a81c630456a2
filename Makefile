# Onward: demo, tests, checks. Everything runs in .venv, which is made from the tested set in constraints.txt.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
BENCH_READY := $(VENV)/.bench-ready
# bitsandbytes apart from the rest: it makes `import peft` seconds slower, and one test needs it.
QLORA := .qlora
# What makes the site and the wheel, apart from the rest.
SITE := .site
DATA ?= $(wildcard ../shared/data)
# The oldest and the newest Python of the classifiers: code and the standard library's types are checked for both.
PYTHONS := $(shell sed -n 's/.*Python :: \(3\.[0-9]*\)".*/\1/p' pyproject.toml | sort -V | sed -n '1p;$$p')
TORCH := $(shell grep '^torch==' constraints.txt)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test soak lint format bench gpu knowledge recipe docs site wheel families qlora browser clean

help: ## list what can be made
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 10

demo: $(READY) ## a real model learns three real files in three processes, as one run
	$(BIN)/python demo/run.py

# Three at a time on two cores: tests also wait for disks and processes, and each worker has to import everything first.
# COVERAGE=1 runs the tests marked slow, too, all under coverage, processes that tests start included, and holds it to the floor.
# Python keeps what it compiled, also where the environment says otherwise: every process of a test would compile it again.
test soak: export PYTHONDONTWRITEBYTECODE :=
test: $(READY) ## the test suite (COVERAGE=1: slow tests too, with branch coverage, which may not fall)
	$(if $(COVERAGE),$(BIN)/coverage erase)
	$(BIN)/python $(if $(COVERAGE),-m coverage run) -m pytest -q -n 3 --dist worksteal $(if $(COVERAGE),,-m "not slow")
	$(if $(COVERAGE),$(BIN)/coverage combine -q)
	$(if $(COVERAGE),$(BIN)/coverage report)

soak: $(READY) ## kills and faults at full size (hours)
	ONWARD_SOAK=1 ONWARD_KILLS=30 $(BIN)/python -m pytest -q -n 2 tests/data tests/training/test_schedule.py \
	  tests/service/test_faults.py tests/service/test_read_faults.py tests/service/test_survival.py tests/service/test_watch.py \
	  tests/service/test_signals.py tests/service/test_going_back.py tests/service/test_continuity.py \
	  tests/service/test_sequences.py tests/test_old_runs.py

lint: $(READY) ## style, types for the oldest and the newest Python, layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@command -v node >/dev/null || $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt "pyright[nodejs]"
	@$(BIN)/pyright --version # which sets it up: not both at once
	echo $(PYTHONS) | xargs -n 1 -P 2 $(BIN)/pyright --pythonversion
	$(BIN)/lint-imports

format: $(READY) ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(BENCH_READY) ## speed against the peers, into bench/RESULTS.md (half an hour; DATA=folder for more rows)
	$(BIN)/python bench/suite.py $(addprefix --data ,$(DATA))

# Without a virtual environment it runs where PYTHON has all that it needs and sees a GPU: there may be no network there.
SEES_GPU = PYTHONPATH=src:$$PYTHONPATH $(PYTHON) -c 'import onward.training.trainer, torch; exit(not torch.cuda.is_available())'
gpu: ## all that has to be seen on a GPU, in eight minutes, into bench/RESULTS-GPU.md (OUT=folder, TINY=1: on a CPU)
	@test ! -x $(BIN)/python && $(SEES_GPU) 2>/dev/null || $(MAKE) --no-print-directory $(READY)
	$$(test -x $(BIN)/python && echo $(BIN)/python || echo $(PYTHON)) bench/gpu/suite.py \
	  $(if $(OUT),--out $(OUT)) $(if $(TINY),--tiny)

knowledge: $(READY) ## what replay and anchor keep of five domains, into bench/KNOWLEDGE.md (an hour; goes on where it was cut)
	$(BIN)/python bench/knowledge.py $(addprefix --data ,$(DATA))

recipe: $(READY) ## the usual recipe and Onward on the same three files
	$(BIN)/python bench/continuity.py

docs: $(READY) ## regenerate the pages made from the code
	$(BIN)/python docs/generate.py
	$(BIN)/python tests/template_sweep.py

site: $(SITE)/.ready ## the documentation as a site, with search, into build/site/site
	$(SITE)/venv/bin/python docs/site.py build/site

wheel: $(SITE)/.ready ## the wheel, checked, and tried in an environment of its own: dist/ (a few minutes)
	rm -rf dist $(SITE)/try
	$(SITE)/venv/bin/python -m build --outdir dist
	$(SITE)/venv/bin/twine check --strict dist/*
	$(PYTHON) -m venv $(SITE)/try
	$(SITE)/try/bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt "$(TORCH)"
	$(SITE)/try/bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt dist/*.whl
	$(SITE)/try/bin/python -P tests/installed.py

qlora: $(QLORA)/.ready ## bitsandbytes in a folder of its own, for the test of 4-bit bases

# Debian's browser where it can be installed; without it the test says that it is left out.
browser: $(VENV)/.browser-ready ## playwright, chromium and hadolint, for the tests of the page in a browser and of the Dockerfile

families: $(READY) ## every causal family of transformers, small, into docs/families.md (half an hour)
	$(BIN)/python tests/families.py --jobs 2

clean: ## remove the virtual environment and what tools left
	rm -rf $(VENV) $(QLORA) $(SITE) build dist .coverage .coverage.* .pytest_cache .ruff_cache .import_linter_cache .hypothesis demo-run

# torch comes first and alone: an open range could bring another build of it, several GB larger.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Onward needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1)." >&2; \
	  echo "Name another one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@echo 'Installing the tested set into $(VENV) (about 1.5 GB, a few minutes the first time)' >&2
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt "$(TORCH)"
	$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

$(SITE)/.ready: docs/requirements.txt
	test -x $(SITE)/venv/bin/python || $(PYTHON) -m venv $(SITE)/venv
	$(SITE)/venv/bin/python -m pip install -qq --disable-pip-version-check -r docs/requirements.txt
	@touch $@

$(BENCH_READY): $(READY)
	$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e ".[bench]"
	@touch $@

$(VENV)/.browser-ready: $(READY)
	$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e ".[browser,image]"
	command -v chromium >/dev/null || { test "$$(id -u)" = 0 && command -v apt-get >/dev/null && \
	  apt-get install -y -qq --no-install-recommends chromium >/dev/null; } || \
	  echo 'chromium is not here: the test that opens the page in a browser is left out' >&2
	@touch $@

$(QLORA)/.ready: $(READY) constraints.txt
	rm -rf $(QLORA)
	$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps -c constraints.txt --target $(QLORA) bitsandbytes
	@touch $@
