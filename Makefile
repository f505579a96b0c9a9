# Every target brings what it needs on a fresh Debian 12; the second time that is only a look.
.PHONY: help setup demo test run lint bench constraints clean
.DEFAULT_GOAL := help
BIN := .venv/bin

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## /\1 /p' $(MAKEFILE_LIST) | while read -r target about; do printf '  make %-12s %s\n' "$$target" "$$about"; done

setup: ## Debian packages, virtual environment, tools that Debian 12 lacks
	@scripts/setup

demo: setup ## signs with every signer and provider, verifies each by another tool, writes demo-report.json
	@$(BIN)/python scripts/demo

test: setup ## the tests; ARGS="-k name" picks some
	@$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

run: setup ## the service in the foreground on a SoftHSM token
	@scripts/run

lint: setup ## ruff, mypy, import-linter, shellcheck
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@shellcheck scripts/setup scripts/unpack-debian scripts/unpack-cst scripts/unpack-u-boot scripts/build-fit-check-sign scripts/unpack-modules scripts/make-constraints scripts/run .ci/run

bench: setup ## rates and memory on a SoftHSM token, writes bench-report.json
	@$(BIN)/python bench $(ARGS)

constraints: setup ## constraints.txt anew, from the newest releases
	@scripts/make-constraints

clean: ## removes all that the other targets made
	rm -rf .venv .cache dist demo-report.json bench-report.json
	rm -rf .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
