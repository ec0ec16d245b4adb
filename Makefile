# Two commands do everything on a fresh Debian or Ubuntu machine, as root or with sudo:
#   make demo    the main job, end to end, with this machine as the device
#   make test    every test that needs no hardware and no emulated device
#   make test-twins    those on emulated devices, virtual machines and container images (root; qemu and Debian's arm64 packages)
# pip's own variables (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS, …) are honoured; see README, Installing.

SHELL := /bin/bash
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
INSTALLED := .venv/.installed
export TORCHAO_FORCE_SKIP_LOADING_SO_FILES := 1

# $(call need,program or file,Debian package,why): install a system package only where something is missing
define need
	@if ! { command -v $(1) || test -e $(1); } >/dev/null 2>&1; then \
		echo "installing $(2): $(3)"; \
		as_root=$$(test $$(id -u) = 0 || echo sudo); \
		$$as_root apt-get update -qq && DEBIAN_FRONTEND=noninteractive $$as_root apt-get install -y -qq --no-install-recommends $(2) >/dev/null; \
	fi
endef

.PHONY: demo test test-twins lint clean

demo: $(INSTALLED)
	@start=$$SECONDS; \
	$(BIN)/rankship run pipeline/recipes/digits.toml --on this-machine && \
	echo "the job took $$((SECONDS - start)) s"

test: $(INSTALLED)
	$(call need,/usr/sbin/sshd,openssh-server,the SSH transport is tested against a real server on loopback)
	$(BIN)/python -m pytest -m "not twin and not system"

test-twins: $(INSTALLED)
	$(call need,/usr/sbin/sshd,openssh-server openssh-client,emulated boards are reached over SSH)
	$(call need,adb,adb,the emulated phone is reached by the real client)
	$(call need,qemu-aarch64-static,qemu-user-static,emulated devices run arm64 programs)
	$(call need,mmdebstrap,mmdebstrap arch-test,emulated devices are made of Debian's packages)
	$(call need,qemu-system-aarch64,qemu-system-arm device-tree-compiler e2fsprogs,a whole board as a virtual machine)
	$(call need,aarch64-linux-gnu-g++,g++-aarch64-linux-gnu binutils,the ExecuTorch runner is built for ARM)
	$(call need,buildah,buildah zstd,the container images are really built)
	$(BIN)/python -m pytest -m "twin or system"

lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

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
