# Two commands matter: `make book` and `make test`. Both build their own environment in .venv.
PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
STAMP  := $(VENV)/.installed
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help env book test chapter serve lock format clean distclean

help: ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or later is needed; this is %s. Try: make PYTHON=python3.12 ..." % sys.version.split()[0])'
	@test -x $(PY) || $(PYTHON) -m venv $(VENV) || { echo "No venv module: install it first (Debian, Ubuntu: apt install python3-venv)."; exit 1; }
	$(PY) -m pip install -q -r requirements.lock
	$(PY) -m pip install -q --no-deps --no-build-isolation -e .
	@touch $@

env: $(STAMP) ## create or update .venv from requirements.lock

book: $(STAMP) ## execute every chapter (profile cpu) and build _build/html/index.html
	$(PY) -m tools.execute --profile cpu
	$(PY) -m tools.site --profile cpu --out _build/html

test: $(STAMP) ## lint, types, unit tests, smoke run of every notebook, strict nbval, site from the smoke run
	$(PY) -m tools.test

chapter: $(STAMP) ## execute and build one chapter: make chapter CH=vae/variational-autoencoder
	@test -n "$(CH)" || { echo "Say which: make chapter CH=vae/variational-autoencoder"; exit 2; }
	$(PY) -m tools.execute --profile cpu $(CH)
	$(PY) -m tools.site --profile cpu --out _build/html --allow-unexecuted

serve: $(STAMP) ## show _build/html at http://localhost:8000
	@test -f _build/html/index.html || { echo "Nothing built yet: run make book first."; exit 2; }
	$(PY) -m http.server 8000 --directory _build/html

format: $(STAMP) ## let ruff format code and notebooks
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

lock: $(STAMP) ## resolve requirements.lock anew (Python 3.10 to 3.13)
	$(PY) -m pip install -q uv
	$(VENV)/bin/uv pip compile --universal --fork-strategy requires-python --python-version 3.10 \
		--no-header --no-annotate pyproject.toml --extra book --extra test -o requirements.lock

clean: ## remove what was built; keep .venv
	rm -rf _build .pytest_cache .mypy_cache .ruff_cache dist

distclean: clean ## remove .venv too
	rm -rf $(VENV)
