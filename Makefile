# Two commands do everything on a fresh Debian or Ubuntu machine, as root or with sudo:
#   make demo    the main job, end to end, with this machine as the device
#   make test    every test that needs no hardware: emulated boards, phones and virtual machines too
# For every day, and for what takes gigabytes:
#   make test-quick     without emulated devices and slow tests: after every change
#   make test-images    the container images, really built and run
#   make bench          how fast it is, beside the baseline: minutes on a quiet machine
#   make bench-counts   the same of the smallest cases by instructions, without a clock
#   make docs           the site, build/docs/index.html; every warning is an error
#   make test-phone-faults   every fault of a phone, into an emulated one: ten minutes
#   make test-debian13  both commands on a fresh Debian 13, in a root of its own: half an hour
# `make demo` installs what a user needs, the tests add what developers need.
# pip's own variables (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS, …) are honoured; see docs/getting-started.md.

SHELL := /bin/bash
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
USERS := .venv/.installed-demo
INSTALLED := .venv/.installed
MLFLOW := .venv-mlflow
MLFLOW_NEEDS := mlflow-skinny==3.17.2 alembic==1.20.1 filelock numpy psutil pydantic rich safetensors scipy sqlalchemy
# One process more than processors: a third of the tests' time is waiting, for boards that boot or hang.
TESTS := $(BIN)/python -m pytest --numprocesses $$(($$(nproc) + 1)) --maxprocesses 4 --dist loadfile --no-loadscope-reorder
# Python compiles what it imports as it goes: compiling all 24,000 files here would take most of the set-up's time.
PIP := -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt
export TORCHAO_FORCE_SKIP_LOADING_SO_FILES := 1
export OMP_WAIT_POLICY := passive
unexport PYTHONDONTWRITEBYTECODE

# Where one of these is missing its package is installed; where it cannot be, the tests that need it are skipped by name.
# program or file|Debian packages|why
define TEST_NEEDS
/usr/sbin/sshd|openssh-server openssh-client|boards are reached over SSH, by a real server on the loopback
adb|adb|the emulated phone is reached by the real client
qemu-aarch64-static|qemu-user-static|emulated devices run arm64 programs
mmdebstrap|mmdebstrap arch-test|emulated devices are made of Debian's packages
nft|nftables|a board's cable is cut, throttled and made lossy
ip|iproute2|boards have networks of their own
unshare|util-linux|boards have disks and networks of their own
/usr/lib/openssh/sftp-server|openssh-sftp-server|most boards copy by this program
initdb|postgresql|the index is kept in a server too
g++|g++|the ExecuTorch runner is built for this machine
fish|fish|the shells complete the verbs
zsh|zsh|the shells complete the verbs
qemu-system-aarch64|qemu-system-arm|a whole board as a virtual machine
fdtput|device-tree-compiler|its device tree says that it is a Raspberry Pi
/sbin/mke2fs|e2fsprogs|its disk is made
zsh|zsh|it runs the completion script made for it
fish|fish|it runs the completion script made for it
aarch64-linux-gnu-g++|g++-aarch64-linux-gnu binutils|the ExecuTorch runner is built for ARM
endef
define IMAGE_NEEDS
buildah|buildah zstd|the container images are built without a daemon
mmdebstrap|mmdebstrap|their base is made of Debian's packages
endef
define DEBIAN_NEEDS
mmdebstrap|mmdebstrap|Debian 13 is made of its packages
unshare|util-linux|it runs in a room of its own
endef
export TEST_NEEDS IMAGE_NEEDS DEBIAN_NEEDS

# $(call install,LIST): install what of a list is missing, in one go
define install
	@missing=''; while IFS='|' read -r program packages why; do \
		{ command -v $$program || test -e $$program || ls /usr/lib/postgresql/*/bin/$$program; } >/dev/null 2>&1 && continue; \
		echo "installing $$packages: $$why"; missing+=" $$packages"; \
	done <<< "$$$(1)"; \
	as_root=$$(test $$(id -u) = 0 || echo sudo); \
	test -z "$$missing" || { $$as_root apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
		$$as_root apt-get install -y -qq --no-install-recommends $$missing >/dev/null; } || \
		echo "could not install$$missing: the tests that need them are skipped by name"
endef

.PHONY: demo test test-quick test-images test-phone-faults test-debian13 bench bench-counts lint docs clean

demo: $(USERS)
	@start=$$SECONDS; \
	$(BIN)/rankship run pipeline/recipes/digits.toml --on this-machine && \
	echo "the job took $$((SECONDS - start)) s"

test: $(INSTALLED) $(MLFLOW)/.installed
	$(call install,TEST_NEEDS)
	$(TESTS) -m "not images and not phone_faults and not debian13"

test-quick: $(INSTALLED)
	$(TESTS) -m "not slow and not twin and not system and not images and not debian13"

test-images: $(INSTALLED)
	$(call install,IMAGE_NEEDS)
	$(BIN)/python -m pytest -m images

test-phone-faults: $(INSTALLED)
	$(call install,TEST_NEEDS)
	$(BIN)/python -m pytest -m phone_faults

test-debian13: $(INSTALLED)
	$(call install,DEBIAN_NEEDS)
	$(BIN)/python -m pytest -s -m debian13

# A slower subject ends with status 1, a baseline of another machine with 5: `cp build/speed/small.json` there to start one.
bench: $(INSTALLED)
	$(BIN)/python -m speed run --size small --again --out build/speed/small.json
	$(BIN)/python -m speed compare benchmarks/baselines/speed/small.json build/speed/small.json

bench-counts: $(INSTALLED)
	$(BIN)/python -m speed count --baseline benchmarks/baselines/speed/instructions.json

lint: docs
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(INSTALLED)
	$(BIN)/python -m sphinx --fresh-env --fail-on-warning --keep-going --quiet docs build/docs

$(USERS): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed: apt-get install python3"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is older than Python 3.11"; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { \
		echo "installing python3-venv: this Python cannot make virtual environments yet"; \
		as_root=$$(test $$(id -u) = 0 || echo sudo); \
		$$as_root apt-get update -qq && DEBIAN_FRONTEND=noninteractive $$as_root apt-get install -y -qq --no-install-recommends python3-venv >/dev/null; }
	@start=$$SECONDS; set -e; \
	echo "setting up .venv: about 2.2 GB on disk, 1 to 2 minutes"; \
	$(PYTHON) -m venv .venv; \
	$(BIN)/python $(PIP) torch==2.13.0; \
	$(BIN)/python $(PIP) --editable '.[all]'; \
	touch $@; \
	echo "set-up took $$((SECONDS - start)) s"

$(INSTALLED): $(USERS)
	@start=$$SECONDS; set -e; \
	echo "adding what developers need to .venv"; \
	$(BIN)/python $(PIP) --editable '.[dev]'; \
	touch $@; \
	echo "that took $$((SECONDS - start)) s"

# MLflow needs a newer typing_extensions than the tflite extra allows. The export needs neither torch nor a runtime, the
# largest parts, so they are left out.
$(MLFLOW)/.installed: pyproject.toml
	@start=$$SECONDS; set -e; \
	echo "setting up $(MLFLOW), for the export to MLflow"; \
	$(PYTHON) -m venv $(MLFLOW); \
	$(MLFLOW)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile $(MLFLOW_NEEDS); \
	$(MLFLOW)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile --no-deps --editable .; \
	touch $@; \
	echo "that took $$((SECONDS - start)) s"

clean:
	rm -rf .venv $(MLFLOW) build dist
