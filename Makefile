# Two commands do everything on a fresh Debian or Ubuntu machine, as root or with sudo:
#   make demo    the main job, end to end, with this machine as the device
#   make test    every test that needs no hardware: emulated boards, phones and virtual machines too
# For every day, and for what takes gigabytes:
#   make test-quick     without emulated devices
#   make test-images    the container images, really built and run
#   make docs           the site, build/docs/index.html; every warning is an error
#   make test-phone-faults   every fault of a phone, into an emulated one: ten minutes
# pip's own variables (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS, …) are honoured; see docs/getting-started.md.

SHELL := /bin/bash
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
INSTALLED := .venv/.installed
TESTS := $(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile
export TORCHAO_FORCE_SKIP_LOADING_SO_FILES := 1

# Where one of these is missing its package is installed; where it cannot be, the tests that need it are skipped by name.
# program or file|Debian packages|why
define TEST_NEEDS
/usr/sbin/sshd|openssh-server openssh-client|boards are reached over SSH, by a real server on the loopback
adb|adb|the emulated phone is reached by the real client
qemu-aarch64-static|qemu-user-static|emulated devices run arm64 programs
mmdebstrap|mmdebstrap arch-test|emulated devices are made of Debian's packages
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
export TEST_NEEDS IMAGE_NEEDS

# $(call install,LIST): install what of a list is missing, in one go
define install
	@missing=''; while IFS='|' read -r program packages why; do \
		{ command -v $$program || test -e $$program; } >/dev/null 2>&1 && continue; \
		echo "installing $$packages: $$why"; missing+=" $$packages"; \
	done <<< "$$$(1)"; \
	as_root=$$(test $$(id -u) = 0 || echo sudo); \
	test -z "$$missing" || { $$as_root apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
		$$as_root apt-get install -y -qq --no-install-recommends $$missing >/dev/null; } || \
		echo "could not install$$missing: the tests that need them are skipped by name"
endef

.PHONY: demo test test-quick test-images test-phone-faults lint docs clean

demo: $(INSTALLED)
	@start=$$SECONDS; \
	$(BIN)/rankship run pipeline/recipes/digits.toml --on this-machine && \
	echo "the job took $$((SECONDS - start)) s"

test: $(INSTALLED)
	$(call install,TEST_NEEDS)
	$(TESTS) -m "not images and not phone_faults"

test-quick: $(INSTALLED)
	$(TESTS) -m "not twin and not system and not images"

test-images: $(INSTALLED)
	$(call install,IMAGE_NEEDS)
	$(BIN)/python -m pytest -m images

test-phone-faults: $(INSTALLED)
	$(call install,TEST_NEEDS)
	$(BIN)/python -m pytest -m phone_faults

lint: docs
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(INSTALLED)
	$(BIN)/python -m sphinx --fresh-env --fail-on-warning --keep-going --quiet docs build/docs

$(INSTALLED): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed: apt-get install python3"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is older than Python 3.11"; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { \
		echo "installing python3-venv: this Python cannot make virtual environments yet"; \
		as_root=$$(test $$(id -u) = 0 || echo sudo); \
		$$as_root apt-get update -qq && DEBIAN_FRONTEND=noninteractive $$as_root apt-get install -y -qq --no-install-recommends python3-venv >/dev/null; }
	@start=$$SECONDS; set -e; \
	echo "setting up .venv: about 2.6 GB on disk, 1 to 3 minutes"; \
	$(PYTHON) -m venv .venv; \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch==2.13.0; \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'; \
	touch $@; \
	echo "set-up took $$((SECONDS - start)) s"

clean:
	rm -rf .venv build dist
