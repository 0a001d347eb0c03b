# Two commands do everything on a fresh machine with Python 3.11: `make demo` and `make test`.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
WORKERS ?= 2
# One thread a process: the tests run side by side, and results must not depend on how many cores there are.
export OMP_NUM_THREADS ?= 1
# glibc gives large buffers back to the system at once and faults them in again for the next layer; keeping them is much faster.
export MALLOC_MMAP_THRESHOLD_ ?= 1073741824
export MALLOC_TRIM_THRESHOLD_ ?= 4294967296

.PHONY: demo test pot arm-root test-arm lint typecheck check clean

$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "zsq-deploy needs Python 3.11 or newer; say which with: make PYTHON=/path/to/python3.11"; exit 2; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { echo "this Python cannot make environments; on Debian: apt-get install python3-venv"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,openvino]'
	@touch $@

demo: $(VENV)/.ready  ## Train, quantize, verify and report the embedded example (under 3 minutes on 2 cores)
	env -u OMP_NUM_THREADS $(BIN)/zsq demo -o demo-out --force

test: $(VENV)/.ready  ## Run the test suite
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(PYTEST_ARGS)

pot: $(VENV)/.ready  ## Make the interpreter of POT (once, in the cache folder) and run POT for real
	$(BIN)/zsq env create pot
	$(BIN)/zsq env check pot
	ZSQ_REQUIRE_POT=1 $(BIN)/python -m pytest -m pot $(PYTEST_ARGS)

arm-root: $(VENV)/.ready  ## Build the emulated Arm user land (once, in the cache folder; as root, on Debian)
	@command -v debootstrap qemu-aarch64-static ssh-keygen >/dev/null && test -x /usr/sbin/sshd || { echo "apt-get install debootstrap qemu-user-static openssh-server"; exit 2; }
	$(BIN)/python tools/arm/arm_root.py build

test-arm: arm-root  ## Prove engines on Arm's kernels, over a real SSH server that lands in the Arm root
	ZSQ_REQUIRE_ARM=1 $(BIN)/python -m pytest -m arm tests/arm $(PYTEST_ARGS)

lint: $(VENV)/.ready  ## Style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy does not follow the import hook of an editable install, so the types are checked on a real installation.
typecheck: $(VENV)/.ready  ## Types, strictly, on the installed package
	rm -rf build/typed
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target build/typed .
	cd build/typed && MYPYPATH=. ../../$(BIN)/mypy --config-file ../../pyproject.toml -p zsq_deploy

check: lint typecheck test  ## Everything that has to hold before a commit lands on main

clean:
	rm -rf build dist demo-out *.egg-info .pytest_cache .mypy_cache .ruff_cache
