# crossedge: `make demo` shows it, `make test` tests it; each sets up what it needs.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
export PYTHONSAFEPATH := 1

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
DEMO_TOOLS := nft:nftables ip:iproute2 ping:iputils-ping
TEST_TOOLS := $(DEMO_TOOLS) ethtool:ethtool iperf3:iperf3 wireguard-go:wireguard-go wg:wireguard-tools conntrack:conntrack tcpdump:tcpdump iptables-legacy:iptables turnutils_stunclient:coturn \
  chromium:chromium podman:podman runc:runc busybox:busybox-static /usr/lib/cni/bridge:containernetworking-plugins systemd-analyze:systemd
export PATH := $(CURDIR)/build/bin:$(PATH)

.PHONY: help
help: ## Show what can be made
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

$(STAMP): requirements/dev.lock setup.cfg pyproject.toml .ci/venv
	@bash .ci/venv $(VENV)
	@touch $@

.PHONY: setup
setup: $(STAMP) ## Make .venv from the locked, hashed requirements

.PHONY: demo
demo: $(STAMP) ## Join six nodes behind five NATs and let every pod ping every pod
	@bash .ci/tools required $(DEMO_TOOLS)
	@$(BIN)/crossedge lab demo --output build

.PHONY: test
test: $(STAMP) ## Run the tests (under 10 minutes)
	@bash .ci/tools required $(DEMO_TOOLS)
	@bash .ci/tools optional $(TEST_TOOLS)
	@bash .ci/cnitool build/bin
	@if [ -n "$(ARGS)" ]; then $(BIN)/pytest -m 'not slow' $(ARGS); else bash .ci/suites build/test $(BIN)/pytest; fi

.PHONY: interop
interop: $(STAMP) ## Run the slow tests: rekeys beside a stock wireguard-go, coturn, kills by the thousand (minutes)
	@bash .ci/tools optional $(TEST_TOOLS)
	@bash .ci/cnitool build/bin
	@if [ -n "$(ARGS)" ]; then $(BIN)/pytest -m slow $(ARGS); else bash .ci/suites build/interop $(BIN)/pytest slow; fi

.PHONY: nat-lab
nat-lab: $(STAMP) ## Punch every pair of NAT kinds, the kernel's too, with real sockets (under 10 minutes)
	@bash .ci/tools required $(DEMO_TOOLS)
	@$(BIN)/pytest -s -m slow tests/test_nat_lab.py $(ARGS)

.PHONY: dark-time
dark-time: $(STAMP) ## Measure how long pairs are cut off after each fault (8 minutes), into build/bench/dark_time.json
	@bash .ci/tools required $(DEMO_TOOLS) conntrack:conntrack
	@$(BIN)/pytest -s -m slow tests/test_dark_time.py $(ARGS)

.PHONY: nat-matrix
nat-matrix: $(STAMP) ## Punch every pair of NAT kinds 200 times, renew the table in docs/nat-traversal.md
	@$(BIN)/python benchmarks/nat_matrix.py --json build/nat-matrix.json --write docs/nat-traversal.md $(ARGS)

.PHONY: check-nat-matrix
check-nat-matrix: $(STAMP) ## The same, and compare with the table that the docs show (3 minutes)
	@$(BIN)/python benchmarks/nat_matrix.py --json build/nat-matrix.json --check docs/nat-traversal.md $(ARGS)

.PHONY: fuzz
fuzz: $(STAMP) ## Try every decoder of untrusted bytes for ARGS="--seconds 60", with a seed that is printed
	@$(BIN)/python tests/fuzz.py $(ARGS)

.PHONY: rendezvous-load
rendezvous-load: $(STAMP) ## Let 1,000 nodes, and a flood, meet a rendezvous through real sockets
	@$(BIN)/pytest -s -m slow tests/test_rendezvous_load.py $(ARGS)

.PHONY: bench-sched
bench-sched: $(STAMP) ## Measure the scheduler against its bars (6 minutes)
	@OPENBLAS_NUM_THREADS=1 PYTHONPATH=benchmarks $(BIN)/python benchmarks/scheduler.py $(ARGS)

.PHONY: exact-sched
exact-sched: $(STAMP) ## Solve placements exactly, for bench-sched to compare with (hours; goes on where it was)
	@OPENBLAS_NUM_THREADS=1 PYTHONPATH=benchmarks $(BIN)/python benchmarks/scheduler.py --exact 600 $(ARGS)

.PHONY: bench-latency
bench-latency: $(STAMP) ## Measure what probing costs and what it is good for (minutes)
	@OPENBLAS_NUM_THREADS=1 PYTHONPATH=benchmarks:tests $(BIN)/python benchmarks/latency.py $(ARGS)

.PHONY: bench-rendezvous
bench-rendezvous: $(STAMP) ## Measure 1,000 nodes and a flood at one rendezvous, into build/bench/rendezvous.json
	@$(BIN)/python benchmarks/rendezvous_scale.py $(ARGS)

.PHONY: bench-cni
bench-cni: $(STAMP) ## Measure ADD and DEL beside bridge + host-local, into build/bench/cni.json
	@bash .ci/tools required /usr/lib/cni/bridge:containernetworking-plugins
	@$(BIN)/python benchmarks/cni.py

.PHONY: bench-datapath
bench-datapath: $(STAMP) ## Measure the data path beside wireguard-go (25 minutes), into build/bench/datapath.json
	@bash .ci/tools required $(DEMO_TOOLS) ethtool:ethtool iperf3:iperf3
	@bash .ci/tools optional go:golang-go wireguard-go:wireguard-go
	@PYTHONPATH=benchmarks $(BIN)/python benchmarks/datapath.py $(ARGS)

.PHONY: lint
lint: $(STAMP) ## Check style, types, import rules and spelling
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@rm -rf build/lint && mkdir -p build && cp -rL tests/typeroot build/lint  # the import lint follows no links
	cd build/lint && ../../$(BIN)/lint-imports --config ../../setup.cfg
	$(BIN)/codespell

.PHONY: lock
lock: ## Renew the locked requirements (needs pip-tools)
	cd requirements && for name in edge sched dev; do pip-compile -q --upgrade --generate-hashes --no-emit-options \
	  --allow-unsafe --strip-extras --no-header -o $$name.lock $$name.in; done

.PHONY: clean
clean: ## Remove what was built
	rm -rf build $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info
