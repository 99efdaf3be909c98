# make demo: from a fresh clone to a finished effect map and report.   make test: checks and tests.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

# Ray would start its own environment tooling otherwise; glibc would give memory back after every forward.
export RAY_ENABLE_UV_RUN_RUNTIME_ENV = 0
export RAY_USAGE_STATS_ENABLED = 0
export HF_HUB_OFFLINE ?= 1

.PHONY: setup demo test lint card check-card figures kind-figures watching-page recompute bench bench-cluster planted chaos
.PHONY: train clean

setup: $(READY)

$(READY): requirements.lock pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $(READY)

demo: setup
	$(BIN)/stepscope run configs/maze_demo.yaml --store runs/maze_demo.zarr
	$(BIN)/stepscope effects runs/maze_demo.zarr
	$(BIN)/stepscope report runs/maze_demo.zarr --out runs/maze_demo_report
	@echo "Open runs/maze_demo_report/report.html"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest

card: setup
	$(BIN)/python -m pipeline.embedded.evaluate --model pipeline/embedded/maze --out pipeline/embedded/maze/model_card.json --docs docs/model_card.md

check-card: setup
	$(BIN)/python -m pipeline.embedded.evaluate --model pipeline/embedded/maze --out pipeline/embedded/maze/model_card.json --docs docs/model_card.md --check

figures: demo
	cp runs/maze_demo_report/patch_map_goal_evidence_recovery_*_0.png docs/effect_map.png

kind-figures: setup
	$(BIN)/python -m docs.make_kind_figures

watching-page: setup
	$(BIN)/python -m docs.make_watching

recompute: setup
	$(BIN)/python -m tests.reference.recompute runs/maze_demo.zarr --cells 50

chaos: setup
	$(BIN)/python -m tests.chaos --trials 60 --out docs/chaos.json
	$(BIN)/python -m docs.make_chaos_table

# Half an hour or so; exits with 1 if a target is missed, the page being written all the same.
bench: setup
	$(BIN)/python -m benchmarks.throughput --out docs/performance.json; code=$$?; $(BIN)/python -m docs.make_performance && exit $$code

# Twenty minutes or so; exits with 1 if a target is missed, the page being written all the same.
bench-cluster: setup
	$(BIN)/python -m benchmarks.cluster --out docs/scale.json; code=$$?; $(BIN)/python -m docs.make_scale && exit $$code

planted: setup
	$(BIN)/python -m benchmarks.planted_table

train: setup
	$(BIN)/python -m pipeline.embedded.train --work build/maze_training

clean:
	rm -rf .venv build runs
