# Two commands: `make demo` and `make test`. Everything else is a part of one of them.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed

.PHONY: demo test test-vllm-short check audit sbom image requirements bench bench-peers soak sim faults fuzz model man gpu test-vllm test-vllm-upstream test-sglang docs manifests clean

demo: $(INSTALLED)
	$(BIN)/kvferry demo $(ARGS)

# Those that flood a daemon or measure have the cores alone; the others share them, by files.
# ARGS: options of pytest, no paths. 5: with them there was none to run in one of the two.
ALONE := tests/attacks tests/bench tests/soak
test: check
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ALONE:%=--ignore=%) $(ARGS) || [ $$? = 5 ]
	$(BIN)/python -m pytest $(ALONE) $(ARGS) || [ $$? = 5 ]
	$(MAKE) test-vllm-short

# The shortest run that hands prompts over between real vLLM engines: two minutes, and 3.5 GB the
# first time. Where vLLM cannot be installed it fails, and so does make test.
test-vllm-short: .venv-vllm/installed
	.venv-vllm/bin/python -c 'import vllm'
	.venv-vllm/bin/python -m pytest -rs -m vllm_short tests/vllm_live

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(MAKE) audit

# Known vulnerabilities of what the image ships; says so and goes on where they cannot be asked for.
audit: .venv-supply/installed
	.venv-supply/bin/python deploy/audit.py deploy/requirements.txt

# What the image ships, as CycloneDX: build/sbom.json.
sbom: .venv-supply/installed
	mkdir -p build
	.venv-supply/bin/cyclonedx-py requirements --pyproject pyproject.toml --mc-type application \
	  --output-reproducible --output-format JSON --output-file build/sbom.json deploy/requirements.txt

# The daemon's image, kvferry:VERSION, by the first of three builders that is there. What can be
# set: deploy/README.md. In any format but docker's, podman and buildah would keep no HEALTHCHECK.
BUILDER = $(firstword $(foreach one,docker podman buildah,$(if $(shell command -v $(one) 2> /dev/null),$(one))))
IMAGE = kvferry
VERSION = $(shell sed -n 's/^version = "\(.*\)"$$/\1/p' pyproject.toml)
COMMIT = $(if $(wildcard .git),$(shell git rev-parse HEAD 2> /dev/null))
build_arg = $(if $(2),--build-arg $(1)='$(2)')
BUILD_ARGS = $(call build_arg,COMMIT,$(COMMIT)) $(call build_arg,PYTHON,$(BASE)) \
	$(call build_arg,EXTRAS,$(EXTRAS)) $(call build_arg,TORCH,$(TORCH)) \
	$(call build_arg,PIP_EXTRA_INDEX_URL,$(TORCH_INDEX))
image:
	$(if $(BUILDER),,$(error none of docker, podman and buildah is installed, and one of them builds the image))
	BUILDAH_FORMAT=docker $(BUILDER) build --tag $(IMAGE):$(VERSION) $(strip $(BUILD_ARGS) $(ARGS)) .

# The image's packages and what builds it, with the hashes of their files, after a change of
# pyproject.toml or constraints.txt: minutes, and it needs the network.
COMPILE := .venv-supply/bin/pip-compile --quiet --generate-hashes --allow-unsafe --strip-extras \
	--no-emit-index-url --no-emit-find-links --no-annotate --no-header
requirements: .venv-supply/installed
	$(COMPILE) --extra serve --extra http --extra tls --constraint constraints.txt \
	  --output-file deploy/requirements.txt pyproject.toml
	$(COMPILE) --only-build-deps --all-build-deps \
	  --output-file deploy/requirements-build.txt pyproject.toml

.venv-supply/installed: deploy/requirements-tools.txt
	$(PYTHON) -m venv .venv-supply
	.venv-supply/bin/python -m pip install --quiet --disable-pip-version-check -r deploy/requirements-tools.txt
	touch $@

# kvferry(1) and a page for each verb, made of the command itself: man build/man/kvferry.1
man: $(INSTALLED)
	$(BIN)/python docs/man.py build/man

# One seed with its story: make sim SEED=7. Many fresh ones: make sim SEEDS=100000 FIRST=1000000
SEEDS ?= 2000
FIRST ?= 0
sim: export PYTHONPATH = tests
sim: $(INSTALLED)
ifdef SEED
	$(BIN)/python -m sim.run --seed $(SEED) --shrink
else
	$(BIN)/python -m sim.run --seeds $(SEEDS) --first $(FIRST) --jobs 2
endif

# Every point of tests/faults/points.py, every process killed and stopped: minutes. A few of them:
# make faults ONLY=sink.ledger or ONLY=kill-decode; SEED draws which hit of a point it is.
faults: export PYTHONPATH = tests
faults: $(INSTALLED)
	$(BIN)/python -m faults.run --all --jobs 2 $(if $(ONLY),--only $(ONLY)) $(if $(SEED),--seed $(SEED))

# Mutated frames for decoders, nodes and ledgers, and for a daemon's sockets; a short form is in
# `make test`. FIRST: fresh seeds.
FRAMES ?= 1000000
fuzz: export PYTHONPATH = tests
fuzz: $(INSTALLED)
	$(BIN)/python -m fuzz.run --frames $(FRAMES) --first $(FIRST)

model: export PYTHONPATH = tests
model: $(INSTALLED)
	$(BIN)/python -m model.walk

# On a machine with a CUDA device and a torch that is built for it; without one they are skipped.
gpu: $(INSTALLED)
	$(BIN)/python -m pytest -m gpu -rs $(ARGS)

# Two real vLLM engines over two daemons, on the CPU: minutes, and 3.5 GB the first time.
test-vllm: .venv-vllm/installed
	.venv-vllm/bin/python -m pytest -rs tests/vllm_live tests/engine/test_versions.py $(ARGS)

.venv-vllm/installed: tests/vllm_live/requirements.txt
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r tests/vllm_live/requirements.txt
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $@

# vLLM's own tests of its connectors, on ours: docs/engines.md says which, and why not the others.
UPSTREAM := build/vllm-0.32.0
test-vllm-upstream: .venv-vllm/installed
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r tests/vllm_live/upstream.txt
	mkdir -p build
	test -d $(UPSTREAM) || (cd build && VLLM_TARGET_DEVICE=empty VLLM_VERSION_OVERRIDE=0.32.0 \
	  ../.venv-vllm/bin/python -m pip download --quiet --no-deps --no-build-isolation --no-binary vllm vllm==0.32.0 \
	  && tar xzf vllm-0.32.0.tar.gz && rm -r vllm-0.32.0/vllm*)  # what is installed is to be tried
	cd $(UPSTREAM) && PYTHONPATH=$(CURDIR)/tests/vllm_live HF_HUB_OFFLINE=1 \
	  $(CURDIR)/.venv-vllm/bin/python -m pytest -p upstream --noconftest $(ARGS)

# The same of SGLang.
test-sglang: .venv-sglang/installed
	.venv-sglang/bin/python -m pytest -rs tests/sglang_live tests/engine/test_sglang_versions.py $(ARGS)

.venv-sglang/installed: tests/sglang_live/requirements.txt
	$(PYTHON) -m venv .venv-sglang
	.venv-sglang/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r tests/sglang_live/requirements.txt
	.venv-sglang/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $@

# Everything in one run, into bench/results: minutes. One part: make bench ARGS='--only pieces'
bench: $(INSTALLED)
	$(BIN)/python -m bench $(ARGS)

# NIXL, Mooncake and vLLM, for make bench to compare with; without them it says that they are absent.
bench-peers: .venv-vllm/installed
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check --no-deps nixl==1.5.1 nixl-cu12==1.5.1
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r bench/peers.txt

# A minute that asks 10,200 calls/s of 2,000 live transfers, then ten minutes of traffic with kills.
# Less: make soak ARGS='--seconds 5 --minutes 1'
soak: $(INSTALLED)
	$(BIN)/python -m bench.load $(ARGS)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/python tests/deploy/get_helm.py $(BIN)/helm
	touch $@

# The pages of docs/ as a site, in build/site.
docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --clean

# Plain manifests of both modes, out of the chart.
manifests: $(INSTALLED)
	$(call manifest,daemonset,kvferry)
	$(call manifest,sidecar,decode)

define manifest
(echo '# Made by `make manifests` from the chart and $(1).values.yaml: change those.'; \
	$(BIN)/helm template $(2) deploy/helm/kvferry -f deploy/helm/$(1).values.yaml) \
	> deploy/kubernetes/$(1).yaml
endef

clean:
	rm -rf $(VENV) .venv-bench .venv-vllm .venv-sglang .venv-supply build *.egg-info
