# make demo   run a real workflow on real images      make test   set up and run all checks and tests
# make docs   build the documentation into site/      make bench  run the benchmarks
# make chaos  kill runs, a hundred of them, again and again; compare warm and cold units on clusters; hold Dask
#             to its contract with a pool for each test
# make clean  remove what these have made

.DELETE_ON_ERROR:
.PHONY: bench chaos clean compiled demo docs lint test

# The first Python that is new enough; or say which: make demo PYTHON=/opt/python3.12/bin/python3
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && command -v $$python && break; done)
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check
WORKERS ?= 2

DEMO := examples/ihc_plate
OUT := $(CURDIR)/$(DEMO)/out

demo: .venv/.package .venv-tasks/.ready compiled
	@mkdir -p $(OUT)
	.venv-tasks/bin/python $(DEMO)/make_plate.py $(OUT)
	.venv/bin/fractal-runner run $(DEMO)/workflow.json --dataset $(DEMO)/dataset.json \
		--zarr-dir $(OUT) --task-env .venv-tasks/bin/python --max-workers $(WORKERS) \
		--workflow-dir $(OUT)/runs/$$(date +%Y%m%d-%H%M%S-%N) --output $(OUT)/dataset.json
	.venv-tasks/bin/python $(DEMO)/show_nuclei.py $(OUT)/dataset.json $(OUT)/plate.png

# Four at a time, on two cores, too: half of the tests wait for a cluster. Those of engines stay together by their
# files: each process that has some starts Dask or Ray once more.
test: .venv/.dev .venv-tasks/.ready .venv-cpython/.ready lint compiled
	.ci/install-postgresql
	.ci/install-slurm
	.venv/bin/python -m pytest -n 4 --dist worksteal --ignore tests/executors/adapters
	.venv/bin/python -m pytest -n 4 --dist loadfile tests/executors/adapters

# Some of what the tests do ten times, a hundred times, and more of what takes long: an hour on two cores.
chaos: .venv/.dev compiled
	.ci/install-slurm
	FRACTAL_RUNNER_CHAOS_RUNS=100 FRACTAL_RUNNER_CHAOS_KILLS=12 \
		.venv/bin/python -m pytest -n 2 --dist worksteal tests/history/test_kills.py
	FRACTAL_RUNNER_PAIRS_ALONE=1 .venv/bin/python -m pytest -n 2 --dist worksteal tests/worker/test_warm_and_cold.py
	FRACTAL_RUNNER_PAIRS_OVER="slurm lsf ibm" .venv/bin/python -m pytest -n 2 --dist worksteal tests/warm
	FRACTAL_RUNNER_OWN_POOLS=1 .venv/bin/python -m pytest -n 2 --dist worksteal \
		tests/executors/adapters/test_dask_conformance.py tests/executors/adapters/test_dask_clusters.py

# An installed package is compiled. This one is where it is edited, and each of its processes would do it.
compiled: .venv/bin/python
	@.venv/bin/python -m compileall -q fractal_runner

lint: .venv/.dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports --no-cache

docs: .venv/.dev
	.venv/bin/mkdocs build --strict

bench: .venv/.dev
	.venv/bin/python -m benchmarks

clean:
	rm -rf .venv .venv-tasks .venv-cpython site $(DEMO)/out benchmarks/results

.venv/bin/python:
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or newer was found: install one, or say PYTHON=…" >&2; exit 1; }
	.ci/make-venv "$(PYTHON)" .venv

.venv/.package: pyproject.toml | .venv/bin/python
	.venv/bin/python $(PIP_INSTALL) --editable .
	@touch $@

.venv/.dev: pyproject.toml | .venv/bin/python
	.venv/bin/python $(PIP_INSTALL) --editable '.[dev]'
	@touch $@ .venv/.package

# The tasks' own environment: fractal-tasks-core pins its own versions of what we use as well.
.venv-tasks/.ready: $(DEMO)/requirements.txt
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or newer was found: install one, or say PYTHON=…" >&2; exit 1; }
	.ci/make-venv "$(PYTHON)" .venv-tasks
	.venv-tasks/bin/python $(PIP_INSTALL) -r $(DEMO)/requirements.txt
	@touch $@

# For CPython's own tests of executors, run over ours. Where no Python ships them there is a note instead,
# which the tests show; the next `make test` looks again.
.venv-cpython/.ready: pyproject.toml
	@mkdir -p $(@D)
	@if python=$$(.ci/find-cpython-tests 2>$(@D)/not-found); then \
		.ci/make-venv "$$python" $(@D) && \
		.venv-cpython/bin/python $(PIP_INSTALL) --editable . && \
		touch $@; \
	else \
		rm -f $@; cat $(@D)/not-found; \
	fi
