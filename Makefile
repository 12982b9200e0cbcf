# make demo   see it all work, in a minute or two
# make test   everything that CI runs
# make e2e    real kernels under QEMU: NVMe, persistent memory with DAX, power cuts, RAID
# make check  the fast part: format, lint, types, layers, unit and property tests
# make bench  the figures in docs/, side by side with the peers
# make compare  the representations side by side: a report in pmblk-compare/

PYTHON := .venv/bin/python
PREFIX ?= /usr/local
# Mounting and loop devices take root; the unit tests do not.
ROOT := $(shell [ "$$(id -u)" = 0 ] || echo sudo)

.PHONY: setup demo check test e2e bench compare lock install clean

setup:
	@.ci/setup

demo: setup
	@$(PYTHON) -m bench.demo

check: setup
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy
	.venv/bin/lint-imports
	$(PYTHON) -m pytest tests/unit

test: check
	@[ -z "$(ROOT)" ] || echo "the end-to-end tests mount and attach: they run with sudo"
	$(ROOT) $(PYTHON) -m pytest tests/e2e

e2e:
	@.ci/setup e2e
	@[ -z "$(ROOT)" ] || echo "the guests are given block devices and mounts: this runs with sudo"
	$(ROOT) .ci/boxed $(PYTHON) -m pytest tests/guest -q -o console_output_style=classic

bench: setup
	$(PYTHON) -m bench.nbd
	$(PYTHON) -m bench.raid
	$(ROOT) $(PYTHON) -m bench.fuse

compare: setup
	$(ROOT) .venv/bin/pmblk compare configs/demo.toml

lock:
	.ci/lock

install: setup
	$(ROOT) env DESTDIR="$(DESTDIR)" .ci/install "$(PREFIX)"

clean:
	rm -rf .venv .cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
