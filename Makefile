# Two commands do all the set-up on a fresh machine with Python 3.11+: `make demo` and `make test`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
# Tests of one file stay together: many share a swarm.
PYTEST := $(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadscope

.PHONY: demo install test lint check format browser compiler network clean

demo: $(INSTALLED)  ## a relay, three peers and the page on this machine
	@exec $(BIN)/python -m web --demo

install: $(INSTALLED)  ## .venv with everything

$(INSTALLED): pyproject.toml constraints.txt package-lock.json hatch_build.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[all,test,clients,check]'
	@touch $(INSTALLED)

test: $(INSTALLED) browser network compiler  ## every test
	$(PYTEST)

check: lint compiler  ## format, lint, types, import bars and the fast tests
	$(PYTEST) -m 'not slow and not browser'

lint: $(INSTALLED)  ## format, lint, types and import bars
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

browser:  ## Chromium, for the tests of the page
	@command -v chromium chromium-browser google-chrome >/dev/null || sh .ci/install-chromium

network:  ## nftables and iproute2, for the tests behind real routers, which only root can run
	@[ "$$(id -u)" != 0 ] || { command -v ip && command -v nft; } >/dev/null || sh .ci/install-nftables

compiler:  ## a C compiler, for the tests of our own kernels
	@{ command -v cc || command -v gcc || command -v clang; } >/dev/null || sh .ci/install-compiler

clean:
	rm -rf $(VENV) web/static/vendor .mypy_cache .ruff_cache .pytest_cache .hypothesis
