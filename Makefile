# Two commands do everything: `make quickstart` and `make test`. Both set up .venv first.
PYTHON ?= python3
BIN := .venv/bin
NEED_INPUT := gpu.py ablation.py ablation_why.py families.py puppet_metrics.py puppet_shards.py smoothing.py

.PHONY: quickstart test test-slow test-cluster test-image check bench ablation clean

quickstart: .venv/ready  ## The whole job on synthetic puppets: minutes on two CPU cores.
	$(BIN)/prioritycut quickstart

test: .venv/ready-dev  ## The default tests, in minutes; those that start Ray clusters run one at a time.
	$(BIN)/python -m pytest tests/unit --numprocesses auto --maxprocesses 4 --dist loadfile
	$(BIN)/python -m pytest tests/integration

test-slow: .venv/ready-dev  ## Long scenarios: killed processes, lost nodes, whole searches.
	$(BIN)/python -m pytest -m slow --timeout 1200

test-cluster: .venv/ready-dev  ## Several hosts on this machine, as network namespaces. Needs root.
	$(BIN)/python -m pytest -m cluster --timeout 3600

test-image: .venv/ready-dev  ## Build the Dockerfile with buildah and run the image. Needs root and gigabytes of disk.
	$(BIN)/python -m pytest -m image --timeout 3600

check: .venv/ready-dev  ## Lint, format, types, import layers.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: .venv/ready  ## Benchmarks on the CPU, each beside its baseline, but for those that need a GPU, clips or models.
	for script in $(filter-out $(addprefix benchmarks/,$(NEED_INPUT)),$(wildcard benchmarks/*.py)); do $(BIN)/python $$script || exit 1; done

ablation: OUT := runs/ablation
ablation: .venv/ready-dev  ## docs/ablation.md, part 1, from scratch: many hours. Run it again to continue.
	mkdir -p $(OUT)
	$(BIN)/python benchmarks/puppet_shards.py data/puppets
	$(BIN)/prioritycut tune tune_configs/ablation_puppets.yaml data.url=data/puppets storage=$(OUT) --resume
	test -s $(OUT)/branches.yaml || $(BIN)/python benchmarks/ablation.py --out $(OUT)/scores \
		--branches tune_configs/ablation_puppets_branches.yaml $(OUT)/ablation_puppets > $(OUT)/branches.yaml
	$(BIN)/prioritycut tune $(OUT)/branches.yaml data.url=data/puppets storage=$(OUT) --resume
	$(BIN)/python benchmarks/ablation.py --out $(OUT)/scores $(OUT)/ablation_puppets $(OUT)/ablation_puppets_branches

clean:  ## Remove the environment and the quickstart's output.
	rm -rf .venv quickstart

.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

.venv/ready-dev: .venv/ready
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@
