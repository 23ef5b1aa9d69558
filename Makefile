# Everything happens in .venv, which is made when missing. On a fresh machine: make quickstart, make test.
PYTHON ?= python3
MINUTES ?= 15
MODEL ?= runs/quickstart/model
# What the quickstart's model was trained to answer in one word by; a model of your own may want INSTRUCTION= .
INSTRUCTION ?= Answer the question using a single word or phrase.
EXAMPLES ?= runs/quickstart/scenes/heldout/vizwiz/val
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: install quickstart test demo serve lint clean-quickstart

install: $(STAMP)

$(STAMP): pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --upgrade pip
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-compile --editable '.[all,dev]'
# pip compiles one file after the other; all processors together save half a minute. Files for other Pythons do not compile and are left, as pip does.
	@$(BIN)/python -m compileall -qq -j 0 .venv/lib || true
	@touch $(STAMP)

quickstart: $(STAMP)
	$(BIN)/python -m train_vlm.quickstart --minutes $(MINUTES)

test: $(STAMP)
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --cov --cov-report=term:skip-covered

demo: $(STAMP)
	$(BIN)/python demo/app.py --model $(MODEL) --instruction "$(INSTRUCTION)" $(if $(wildcard $(EXAMPLES)),--examples $(EXAMPLES))

serve: $(STAMP)
	$(BIN)/python demo/server.py --model $(MODEL)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean-quickstart:
	rm -rf runs/quickstart
