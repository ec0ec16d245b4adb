"""The files that the system stand-in boots from: an arm64 Debian kernel, an initramfs, a disk and device trees."""

import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from rankship_pipeline.foundation.errors import InputError
from rankship_targets.twin import board, cpio, debian_root
from rankship_targets.twin.cache import find_or_make, print_news
from rankship_targets.twin.debian_root import find_root, run_tool, unpack_packages

QEMU = "qemu-system-aarch64"
PACKAGES = "qemu-system-arm device-tree-compiler e2fsprogs"
TOOLS = "/usr/sbin:/sbin:/usr/local/bin:/usr/bin:/bin"  # whatever the caller's PATH is
CORE_COUNTS = (4, 1)
DISK_BYTES = 2 << 30
_KERNEL = "linux-image-cloud-arm64"
# The modules that the initramfs must load, unless the kernel has them built in; their dependencies are found.
_MODULES = ("virtio_pci", "virtio_blk", "virtio_net", "ext4", "sch_netem")
_DEPENDS = re.compile(rb"\0depends=([^\0]*)\0")
_INIT = """#!/bin/busybox sh
b=/bin/busybox
$b mount -t devtmpfs dev /dev; $b mount -t proc proc /proc; $b mount -t sysfs sys /sys
for module in $($b cat /modules/order); do $b insmod /modules/$module.ko; done
i=0; while [ ! -b /dev/vda ] && [ $i -lt 100 ]; do $b sleep 0.1; i=$((i+1)); done
$b mount -t ext4 -o rw,noatime /dev/vda /new
for folder in dev proc sys; do $b mount --move /$folder /new/$folder; done
$b mkdir -p /new/run/board; $b cp -a /board/. /new/run/board/; $b cp -a /pi-init /new/run/pi-init
exec $b switch_root /new /run/pi-init
"""
_PI_INIT = f"""#!/bin/sh
export PATH={debian_root.PATH}
mkdir -p /dev/pts /dev/shm /run/sshd
mount -t devpts devpts /dev/pts; mount -t tmpfs tmpfs /dev/shm; mount -t tmpfs tmpfs /tmp; chmod 1777 /tmp /dev/shm
ln -sf /proc/self/fd /dev/fd; hostname raspberrypi
link=$(ls /sys/class/net | grep -v '^lo$' | head -1)
ip link set lo up; ip link set "$link" up; ip addr add 10.0.2.15/24 dev "$link"; ip route add default via 10.0.2.2
[ -d /sys/class/thermal ] && mount --bind /run/board/sys/class/thermal /sys/class/thermal
settings="-o UsePAM=no -o PasswordAuthentication=no -o PermitRootLogin=prohibit-password -o SetEnv=PATH=$PATH"
/usr/sbin/sshd -D -e $settings > /var/log/sshd.log 2>&1 &
echo "the board is up after $(cut -d' ' -f1 /proc/uptime) s" > /dev/console
while :; do sleep 1000 & wait; done
"""


def find_machine_files() -> Path:
    """Return the folder with `vmlinuz`, `initrd`, `root.img`, and `pi-4.dtb`, `pi-1.dtb` for four cores and one core.

    Its `keys` are those of the Debian root on the disk.
    """
    root = find_root()
    made_of = "\n".join([root.name, *(Path(file).read_text() for file in (__file__, cpio.__file__, board.__file__))])
    return find_or_make("machine", made_of, lambda folder: _make(folder, root))


def describe_machine(cores: int) -> list[str]:
    """Return qemu's arguments for the machine itself, with which its device tree must agree."""
    return ["-cpu", "cortex-a72", "-smp", str(cores), "-m", "2G", "-nodefaults", "-display", "none"]


def _make(folder: Path, made: Path) -> None:
    for tool in (QEMU, "fdtput", "mke2fs"):
        if not shutil.which(tool, path=TOOLS):
            raise InputError(f"the system stand-in needs {tool}", hint=f"run `apt-get install {PACKAGES}`")
    print_news("unpacking a kernel for arm64, once (about 30 s)")
    kernel = folder / "kernel"
    unpack_packages(kernel, [_KERNEL])
    (image,) = (kernel / "boot").glob("vmlinuz-*")
    shutil.copy(image, folder / "vmlinuz")
    (folder / "initrd").write_bytes(_pack_initramfs(kernel, made / "root", folder / "board"))
    shutil.rmtree(kernel)
    print_news("making the system stand-in's disk, once (a few seconds)")
    disk = folder / "root.img"
    with disk.open("wb") as stream:
        stream.truncate(DISK_BYTES)
    # With a journal, as on a board's card: a machine that is reset while writing must boot again.
    run_tool(["/sbin/mke2fs", "-q", "-t", "ext4", "-J", "size=8", "-d", made / "root", disk], timeout_s=300)
    for cores in CORE_COUNTS:
        _write_tree(folder / f"pi-{cores}.dtb", cores)
    shutil.copytree(made / "keys", folder / "keys")


def _pack_initramfs(kernel: Path, root: Path, board_folder: Path) -> bytes:
    board.write_board(board_folder)
    found = {path.name.removesuffix(".ko"): path for path in kernel.rglob("*.ko")}
    order = _order_modules(found)
    files = {
        "init": (_INIT.encode(), 0o755),
        "pi-init": (_PI_INIT.encode(), 0o755),
        "bin/busybox": ((root / "bin/busybox").read_bytes(), 0o755),
        "modules/order": ("\n".join(order).encode(), 0o644),
        **{f"modules/{name}.ko": (found[name].read_bytes(), 0o644) for name in order},
    }
    inside = sorted(path for path in board_folder.rglob("*") if path.is_relative_to(board_folder / "sys"))
    folders = ["bin", "dev", "proc", "sys", "modules", "new", "board"]
    folders += [f"board/{path.relative_to(board_folder)}" for path in inside if path.is_dir()]
    files |= {
        f"board/{path.relative_to(board_folder)}": (path.read_bytes(), 0o644) for path in inside if path.is_file()
    }
    shutil.rmtree(board_folder)
    return cpio.pack_initramfs(folders, files)


def _order_modules(found: Mapping[str, Path]) -> list[str]:
    """Return the modules in an order in which each comes after those that it depends on."""
    order: list[str] = []

    def add(name: str) -> None:
        if name in order or name not in found:
            return
        named = _DEPENDS.search(found[name].read_bytes())
        for need in filter(None, named.group(1).decode().split(",") if named else ()):
            add(need)
        order.append(name)

    for name in _MODULES:
        add(name)
    return order


def _write_tree(path: Path, cores: int) -> None:
    """Write the device tree of qemu's machine, with the model set to a Raspberry Pi 4."""
    run_tool([QEMU, "-M", f"virt,gic-version=2,dumpdtb={path}", *describe_machine(cores)], timeout_s=60)
    run_tool(["fdtput", "-t", "s", path, "/", "model", board.MODEL], timeout_s=60)
    run_tool(["fdtput", "-t", "s", path, "/", "compatible", *board.COMPATIBLE, "linux,dummy-virt"], timeout_s=60)
