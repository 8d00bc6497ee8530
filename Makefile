# Every command sets up what it needs in .venv; a second run starts at once.
PYTHON ?= python3
BIN := .venv/bin
# auto: with CUDA where a compiler is to be had; on: with CUDA or not at all; off: for the CPU alone.
export MACKO_CUDA ?= auto
INSTALLED := .venv/.installed-$(MACKO_CUDA)

# Variables, not --constraint, so that they hold where pip builds macko, too: the first with pip up to 25.2, then the second.
PINNED := PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt

.PHONY: help demo build test test-oldest test-eval test-sanitize test-aarch64 lint test-gpu test-vllm bench wheel lock clean

help:
	@echo "make demo           prune, pack, evaluate and generate with the bundled model"
	@echo "make test           run the tests"
	@echo "make test-oldest    run what touches transformers with the oldest transformers that is supported"
	@echo "make test-eval      run the tests that need lm-eval, with lm-eval in front of the pinned packages"
	@echo "make test-sanitize  check the CPU library with the address and undefined behaviour sanitizers"
	@echo "make test-aarch64   check the CPU library as built for ARM, under emulation"
	@echo "make lint           check style, types, imports and formatting"
	@echo "make build          build the native library and install macko into .venv"
	@echo "make test-gpu       run the tests that need a GPU"
	@echo "make test-vllm      run the tests that need vLLM, in an environment of their own of about 10 GB"
	@echo "make bench          measure sizes, perplexities and speeds of the bundled model"
	@echo "make wheel          build a wheel into dist/ and try it in a new environment, its library in other Pythons, too"
	@echo "make lock           set up .venv anew with the newest packages and pin them in constraints.txt"

demo: $(INSTALLED)
	$(BIN)/macko demo

build: $(INSTALLED)

# TESTS: files, or pytest's options.
test: $(INSTALLED)
	$(BIN)/python -m pytest $(TESTS)

# In front of the packages of .venv; absolute, because tests start processes in other folders. New processes are slow to start, so
# the orders in which peft is imported are left to `make test`.
OLDEST := $(CURDIR)/.venv/oldest
TEST_OLDEST := test_transformers_integration.py test_like_any_checkpoint.py test_loading.py test_engine.py test_models.py \
	test_peft_integration.py test_pruning.py test_streaming_prune.py test_perplexity.py \
	test_surroundings.py::test_a_revision_and_a_cache_choose_the_model \
	test_import_hook.py::test_plain_transformers_loads_packed_where_macko_is_installed \
	test_hub_download.py::test_plain_transformers_loads_a_branch_of_the_hub

test-oldest: $(OLDEST)/.installed
	PYTHONPATH=$(OLDEST) $(BIN)/python -c 'import transformers; print("with transformers", transformers.__version__)'
	PYTHONPATH=$(OLDEST) $(BIN)/python -m pytest $(addprefix tests/,$(TEST_OLDEST)) \
		--deselect tests/test_peft_integration.py::test_peft_may_be_imported_before_or_after_macko

# In front of them in the same way. The first line fails where lm-eval cannot be imported; pytest would skip the tests.
EVAL := $(CURDIR)/.venv/eval

test-eval: $(EVAL)/.installed
	PYTHONPATH=$(EVAL) $(BIN)/python -c 'import lm_eval, macko_llm.evaluation; print("with lm-eval", lm_eval.__version__)'
	PYTHONPATH=$(EVAL) $(BIN)/python -m pytest -m lm_eval $$(grep -l 'mark\.lm_eval' tests/test_*.py)

# Without Python, hence without .venv.
test-sanitize:
	csrc/tests/run sanitize

test-aarch64:
	csrc/tests/run aarch64

test-gpu: $(INSTALLED)
	$(BIN)/python -m pytest tests/gpu

# vLLM asks for a torch of its own, so nothing is pinned here.
test-vllm:
	test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --editable '.[vllm]' pytest
	.venv-vllm/bin/python -m pytest tests/vllm

bench: $(INSTALLED)
	$(BIN)/macko bench quality

# WHEEL_PYTHON=other-env/bin/python tries it with the dependencies of another environment.
wheel: $(INSTALLED)
	rm -f dist/*.whl
	$(PINNED) $(BIN)/python -m pip wheel --no-deps --wheel-dir dist .
	$(BIN)/python -m tools.try_wheel dist/*.whl $(WHEEL_PYTHON)

lint: $(INSTALLED)
	$(BIN)/pre-commit run --all-files --show-diff-on-failure

lock:
	rm -rf .venv
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install "$$(grep '^torch==' constraints.txt)" --editable '.[dev]'
	$(BIN)/python -m pip freeze --all --exclude pip --exclude-editable > .venv/frozen.txt
	sed '/^torch==/q' constraints.txt > .venv/constraints.txt
	oldest=$$($(BIN)/python -c 'import sys; print("%d.%d" % sys.version_info[:2])') && \
	sed -e '/^torch==/d' -e 's/+.*//' -e "s/$$/; python_version >= \"$$oldest\"/" .venv/frozen.txt >> .venv/constraints.txt
	mv .venv/constraints.txt constraints.txt
	touch $(INSTALLED)

clean:
	rm -rf .venv .venv-vllm build dist

$(INSTALLED): pyproject.toml constraints.txt $(shell find csrc -type f) $(wildcard build_backend/*.py build_backend/*.pth)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PINNED) $(BIN)/python -m pip install --editable '.[dev]'
	rm -f .venv/.installed*
	touch $@

$(CURDIR)/.venv/%/.installed: constraints-%.txt $(INSTALLED)
	rm -rf $(@D)
	$(BIN)/python -m pip install --quiet --no-deps --target $(@D) --requirement $<
	touch $@
