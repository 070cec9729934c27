# Two commands are enough: `make demo` and `make test`. Both set up .venv first; the second time that takes no time.
SHELL := /bin/sh
PYTHON ?= $(shell for p in python3.12 python3.11 python3 python; do \
	if $$p -c 'import sys; sys.exit(sys.version_info < (3, 6))' >/dev/null 2>&1; then echo $$p; break; fi; done)
OUT ?= out/demo
PRESET ?= small

.DEFAULT_GOAL := help
.PHONY: help setup demo train weights comparison tables figures test docs lint clean

help: ## list the targets
	@awk -F':.*## ' '/^[a-z]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## make .venv and install what is missing (done by the others, too)
	@if [ -z "$(PYTHON)" ]; then echo "nofa set-up: no Python was found: install Python 3.11 or 3.12 (Debian 12, Ubuntu 24.04: sudo apt-get install python3 python3-venv; macOS: brew install python@3.12)." >&2; exit 1; fi
	@$(PYTHON) .ci/setup.py

demo: setup ## render the face world into out/demo, with a report to open in a browser
	@.venv/bin/nofa demo --out $(OUT)

train: setup ## PRESET=small (or smoke, base): train everything from nothing, or go on; MAX_SECONDS=600 for a slice
	@.venv/bin/nofa train all --preset $(PRESET) $(if $(MAX_SECONDS),--max-seconds $(MAX_SECONDS))

weights: setup ## PRESET=small: write the weights of a finished training over those in nofa_nb/weights/small
	@.venv/bin/nofa train weights --preset $(PRESET) --to nofa_nb/weights/$(PRESET)

comparison: setup ## PRESET=small: train what Tables 1, 3 and 5 need beside the full model, after `make train`
	@.venv/bin/snakemake -s workflow/comparison.smk --cores 2 --rerun-triggers mtime --rerun-incomplete --nolock --quiet host reason --config preset=$(PRESET) -- comparison

test: setup ## all checks: export drift, clean notebooks, ruff, pytest, every notebook executed
	@.venv/bin/python .ci/test.py

tables: setup ## measure what is missing of Tables 1 to 5 and draw them into out/tables/$(PRESET) (PRESET=small)
	@.venv/bin/snakemake -s workflow/tables.smk --cores 2 --rerun-triggers mtime --rerun-incomplete --nolock --quiet host reason --config preset=$(PRESET) -- tables

figures: setup ## draw what is missing of Figures 4 to 13 into out/figures/$(PRESET) (PRESET=small)
	@.venv/bin/snakemake -s workflow/figures.smk --cores 2 --rerun-triggers mtime --rerun-incomplete --nolock --quiet host reason --config preset=$(PRESET) -- figures

docs: setup ## build the documentation site into site/
	@.venv/bin/python .ci/docs.py

lint: setup ## ruff only
	@.venv/bin/ruff check .

clean: ## delete what was made (out with its trainings, site, caches); .venv stays
	@rm -rf out site _docs _proc build .cache .pytest_cache .ruff_cache .hypothesis .snakemake *.egg-info
	@find nbs nofa_nb tests .ci -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
