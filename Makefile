# `make demo` trains, exports, samples and benchmarks a small model; `make test` checks the project.
# Both install into .venv on the first call. Flags for pip: make test PIP_FLAGS="--index-url ..."
# `make quick` runs the most telling checks in under a minute on two cores: lint, types, and the tests in QUICK below.
# `make fuzz` feeds every reader of files with mutated ones, for about a quarter of an hour.
# `make fuzz-cpp` does the same for the C++ readers for a minute, with libFuzzer.
# `make docs` builds the site into site/ and fails on every warning.
# `make gpu` runs what needs an NVIDIA GPU, with .venv where it is, else with PYTHON, and installs nothing.
PYTHON ?= python3
PIP_FLAGS ?=
GPU_FLAGS ?=
GPU_OUT ?= runs/gpu
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed

.PHONY: demo test quick lint docs fuzz fuzz-cpp cpp-tools web-tools gpu clean

demo: $(INSTALLED)
	@mkdir -p demo
	$(BIN)/cmfast-train digits --out demo
	$(BIN)/cmfast-export demo/model.pt
	$(BIN)/cmfast-export demo/model.pt --kind sampler --steps 2 -o demo/sampler.onnx
	$(BIN)/cmfast-sample demo/model.onnx -n 64 --steps 2 --seed 0 -o demo/samples.png
	$(BIN)/cmfast-eval demo/model.onnx --data-set digits --steps 1,2,4 --train-log demo --json demo/quality.json --plot demo/quality.png
	$(BIN)/cmfast-bench demo/model.onnx demo/sampler.onnx --baseline demo/model.pt --steps 1,2 --batch 1,8 --seconds 1 --json demo/latency.json --plot demo/latency.png
	@echo "demo/samples.png holds 64 digits drawn in two steps each"

test: lint cpp-tools web-tools
	$(BIN)/python -m pytest -n logical --dist loadfile

# The formulas, the arrows between the packages, the borders; one run killed and continued, one export against PyTorch.
QUICK := tests/runtime tests/backends/test_onnxruntime_backend.py tests/evaluation/test_metrics.py tests/cli/test_cli_info.py
QUICK += $(addprefix tests/promises/test_,house.py imports.py layout.py border.py readme.py)
QUICK += $(addprefix tests/training/,test_config.py test_ema.py networks/test_adm.py methods/test_losses.py methods/test_schedules.py)
QUICK += tests/training/loop/test_loop.py::test_a_run_killed_at_any_step_and_begun_again_ends_with_the_same_bits
QUICK += 'tests/export/test_export.py::test_a_file_computes_what_pytorch_computes_at_every_noise_level_and_batch[10]'

quick: lint
	$(BIN)/python -m pytest -q -n logical --dist loadfile $(QUICK)

# The tests that need a GPU run rarely; their types say where the code has left them behind.
lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	MYPYPATH=tests:benchmarks $(BIN)/mypy tests/gpu/*.py

docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

fuzz: $(INSTALLED)
	$(BIN)/python benchmarks/fuzz.py --inputs 1000000 --json benchmarks/results/fuzz.json

# g++, clang++, CMake and pkg-config, where Debian's packages can be installed; else tests are skipped by a tool's name.
cpp-tools:
	@sh tests/cpp/tools.sh

# Chromium and onnxruntime-web, likewise.
web-tools:
	@sh tests/web/tools.sh

# libFuzzer on the C++ readers; FUZZ_SECONDS sets how long. Findings stay in runs/fuzz.
FUZZ_SECONDS ?= 60
fuzz-cpp: $(INSTALLED) cpp-tools
	$(BIN)/python benchmarks/fuzz_cpp.py --seconds $(FUZZ_SECONDS) --folder runs/fuzz

# CMFAST_COMMIT: of a copy, the commit that it is a copy of.
gpu: PY = $(if $(wildcard $(BIN)/python),$(abspath $(BIN))/python,$(PYTHON))
gpu: export PYTHONPATH = $(shell $(PY) benchmarks/offline.py)
gpu:
	@mkdir -p $(GPU_OUT)
	-$(PY) benchmarks/gpu.py smoke --out $(GPU_OUT)/smoke.jsonl $(GPU_FLAGS)
	-$(PY) benchmarks/gpu.py bench --out $(GPU_OUT)/bench.jsonl $(GPU_FLAGS)
	-$(PY) benchmarks/gpu.py tests --out $(GPU_OUT)/tests.jsonl $(GPU_FLAGS)
	$(if $(CMFAST_DATA),-$(PY) benchmarks/gpu.py train --data-root $(CMFAST_DATA) --out $(GPU_OUT)/train.jsonl $(GPU_FLAGS))

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt -e ".[dev]"
	@touch $(INSTALLED)

clean:
	rm -rf $(VENV) demo build dist site
