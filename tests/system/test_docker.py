"""The images, really built and really run: by buildah, without a daemon, on a base made from Debian's packages."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from make.recipes import write_untrained_recipe
from make.ssh_servers import greets
from make.waiting import wait_until

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "docker/build"
PROGRAMS = ("buildah", "mmdebstrap")
USER = 1000  # of every image
SUITE = 'recipe = "tiny.toml"\nrounds = 2\nmin_samples = 5\nmin_duration_ms = 1\n'
UNREADABLE_RECIPE = 'name = "none"\nbudgets = 3\n'

pytestmark = [
    pytest.mark.images,
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0, reason="a local base image is made by root"),
    *(pytest.mark.skipif(not shutil.which(name), reason=f"no {name}: apt-get install {name}") for name in PROGRAMS),
]


class Images:
    """A storage of images that lives as long as the tests."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._environment = os.environ | {
            "BUILDAH_ISOLATION": "chroot",
            "CONTAINERS_REGISTRIES_CONF": str(folder / "registries.conf"),
        }
        (folder / "registries.conf").touch()

    def build(self, name: str, *extra: str) -> None:
        command = [str(BUILD), "--local-base", "--storage", str(self._folder), name, *extra]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]

    def start(self, name: str) -> str:
        """Make a container of an image; gives its name."""
        return self.call("from", "--pull-never", name).strip()

    def call(self, *words: str) -> str:
        done = subprocess.run(self._command(*words), env=self._environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def run(self, container: str, *words: str, volumes: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self._run_command(container, words, volumes),
            env=self._environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )

    @contextlib.contextmanager
    def serve(self, container: str, *words: str, volumes: tuple[str, ...], log: Path) -> Iterator[None]:
        """Keep a command running in a container while the block runs."""
        command = self._run_command(container, words, volumes)
        with log.open("wb") as output:
            server = subprocess.Popen(
                command, env=self._environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )
        try:
            yield
        finally:
            started = psutil.Process(server.pid)
            for process in [*started.children(recursive=True), started]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            server.wait()

    def settings(self, image: str) -> dict[str, Any]:
        """Read what a started container gets from its image."""
        told: dict[str, Any] = json.loads(self.call("inspect", "--type", "image", image))["Docker"]["config"]
        return told

    def _run_command(self, container: str, words: tuple[str, ...], volumes: tuple[str, ...]) -> list[str]:
        mounts = [word for volume in volumes for word in ("--volume", volume)]
        return self._command("run", "--network", "host", *mounts, container, "--", *words)

    def _command(self, *words: str) -> list[str]:
        folders = ["--root", str(self._folder / "layers"), "--runroot", str(self._folder / "run")]
        return ["buildah", *folders, "--storage-driver", os.environ.get("STORAGE_DRIVER", "overlay"), *words]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Images]:
    folder = tmp_path_factory.mktemp("images")
    kept = Images(folder)
    yield kept
    kept.call("rm", "--all")
    kept.call("rmi", "--all", "--force")
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def host(images: Images) -> str:
    images.build("host", "--build-arg", "EXTRAS=onnx")
    return images.start("rankship-host")


@pytest.fixture(scope="module")
def kit(images: Images) -> str:
    images.build("kit")
    return images.start("rankship-kit")


@pytest.fixture(scope="module")
def keys(images: Images, board: str, port: int, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make both sides' keys by the image's own program, as compose's first service does."""
    folder = tmp_path_factory.mktemp("keys")
    for side in ("board", "host"):
        (folder / side).mkdir(mode=0o700)
        os.chown(folder / side, USER, USER)
    mounts = tuple(f"{folder}/{side}:/keys/{side}" for side in ("board", "host"))
    made = images.run(board, "make-keys", "127.0.0.1", str(port), volumes=mounts)
    assert made.returncode == 0, made.stderr
    return folder


@pytest.fixture(scope="module")
def board(images: Images) -> str:
    images.build("pi")
    return images.start("rankship-pi")


@pytest.fixture(scope="module")
def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@pytest.fixture
def server(images: Images, board: str, keys: Path, port: int, tmp_path: Path) -> Iterator[Path]:
    """Run the board's SSH server as its image says, on the loopback; gives the folder of the host's keys."""
    words = [*images.settings("rankship-pi")["Entrypoint"], "-o", "ListenAddress=127.0.0.1", "-p", str(port)]
    volumes = (f"{keys}/board:/keys/board:ro",)
    with images.serve(board, *words, volumes=volumes, log=tmp_path / "log"):
        wait_until(lambda: greets(port), timeout_s=30)
        yield keys / "host"


def test_the_host_image_starts_the_command_as_a_plain_user(images: Images, host: str) -> None:
    settings = images.settings("rankship-host")
    assert (settings["Entrypoint"], settings["User"]) == (["rankship"], "rankship")
    assert images.run(host, "id", "-u").stdout.strip() == str(USER)
    assert "usage: rankship VERB" in images.run(host, "rankship", *settings["Cmd"]).stdout
    assert images.run(host, "rankship", "--version").stdout.startswith("rankship ")
    assert "this-machine" in images.run(host, "rankship", "devices").stdout


def test_the_host_image_refuses_a_wrong_recipe_with_status_2(images: Images, host: str) -> None:
    written = images.run(host, "sh", "-c", f"printf '{UNREADABLE_RECIPE}' > wrong.toml")
    assert written.returncode == 0, written.stderr
    refused = images.run(host, "rankship", "build", "wrong.toml")
    assert refused.returncode == 2, refused.stderr
    assert "wrong.toml" in refused.stderr


def test_the_host_image_holds_a_torch_without_cuda_and_no_build_tools(images: Images, host: str) -> None:
    said = images.run(host, "python3", "-c", "import torch; print(torch.version.cuda)")
    assert said.stdout.strip() == "None", said.stderr
    for tool in ("gcc", "pip", "pip3"):
        assert images.run(host, "sh", "-c", f"command -v {tool}").returncode != 0, tool


@pytest.mark.parametrize("name", ["host", "pi", "kit"])
def test_what_pip_was_told_stays_out_of_the_image(images: Images, name: str, request: pytest.FixtureRequest) -> None:
    container = request.getfixturevalue({"pi": "board"}.get(name, name))
    assert images.run(container, "sh", "-c", "cat /etc/pip.conf /run/secrets/* 2>/dev/null").stdout == ""
    kept = images.settings(f"rankship-{name}")["Env"]
    assert [line for line in kept if line.startswith(("PIP_", "http_proxy", "SSL_"))] == []


def test_the_build_context_holds_nothing_but_sources(images: Images, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    for name in (".git/config", ".venv/bin/python", "rankship-results/a/report.html", "pipeline/__pycache__/a.pyc"):
        (tree / name).parent.mkdir(parents=True)
        (tree / name).write_text("not for images")
    for name in ("pyproject.toml", "pipeline/rankship_pipeline/cli.py"):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tree / name)
    shutil.copy(ROOT / ".dockerignore", tree)
    (tmp_path / "Dockerfile").write_text("FROM scratch\nCOPY . /\n")
    images.call("bud", "--quiet", "--tag", "context", "--file", str(tmp_path / "Dockerfile"), str(tree))
    mounted = Path(images.call("mount", images.start("context")).strip())
    found = {str(path.relative_to(mounted)) for path in mounted.rglob("*") if path.is_file()}
    assert found == {"pyproject.toml", "pipeline/rankship_pipeline/cli.py"}


def test_the_board_answers_only_its_user_with_the_pinned_key(server: Path, port: int, tmp_path: Path) -> None:
    inventory = (server / "devices.toml").read_text()
    pinned = inventory.partition('host_key = "')[2].partition('"')[0]
    (tmp_path / "known").write_text(f"[127.0.0.1]:{port} {pinned}\n")
    key = tmp_path / "key"
    shutil.copy(server / "id_ed25519", key)
    key.chmod(0o600)
    flags = ["-F", "none", "-p", str(port), "-o", "BatchMode=yes", "-o", "IdentitiesOnly=yes"]
    flags += ["-o", f"UserKnownHostsFile={tmp_path}/known", "-o", "StrictHostKeyChecking=yes"]

    def ask(*extra: str) -> subprocess.CompletedProcess[str]:
        command = ["ssh", *flags, *extra, "pi@127.0.0.1", "uname -m; id -un; cat /proc/device-tree/model; exit 7"]
        return subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=60
        )

    answer = ask("-i", str(key))
    assert answer.stdout.rstrip("\0").split("\n") == ["aarch64", "pi", "Raspberry Pi 4 Model B Rev 1.4"], answer.stderr
    assert answer.returncode == 7
    stranger = tmp_path / "stranger"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", stranger], check=True)
    refused = ask("-i", str(stranger))
    assert refused.returncode == 255
    assert "Permission denied (publickey)" in refused.stderr


def test_keys_are_made_once(images: Images, board: str, keys: Path) -> None:
    before = (keys / "board/host_key.pub").read_text()
    mounts = tuple(f"{keys}/{side}:/keys/{side}" for side in ("board", "host"))
    assert images.run(board, "make-keys", volumes=mounts).returncode == 0
    assert (keys / "board/host_key.pub").read_text() == before
    assert images.run(board, "sh", "-c", "find / -xdev -name '*host*key' -type f").stdout == "", "none in the image"


def test_the_host_image_examines_the_board_and_measures_on_it(
    images: Images, host: str, server: Path, tmp_path: Path
) -> None:
    recipes = tmp_path / "recipes"
    recipes.mkdir(mode=0o755)
    write_untrained_recipe(recipes, "a", "b")
    (recipes / "suite.toml").write_text(SUITE)
    mounts = (f"{server}:/keys/host:ro", f"{recipes}:/recipes:ro")
    inventory = ("--inventory", "/keys/host/devices.toml")

    def rankship(*words: str) -> str:
        done = images.run(host, "env", "OMP_NUM_THREADS=1", "rankship", *words, volumes=mounts)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    findings = rankship("doctor", "pi4", *inventory)
    assert all(text in findings for text in ("on aarch64", "onnxruntime 1.", "ai-edge-litert 2.", "48.2 °C"))
    rankship("build", "/recipes/tiny.toml")
    rankship("bench", "/recipes/suite.toml", "--on", "pi4", *inventory)
    (report,) = images.run(host, "sh", "-c", "ls rankship-results/*/report.html").stdout.splitlines()
    assert "aarch64" in images.run(host, "cat", report).stdout


def test_the_kit_image_compiles_for_the_board_and_fetches_its_wheels(images: Images, kit: str) -> None:
    source = "#include <thread>\nint main() { std::thread([] {}).join(); }\n"
    compiled = images.run(kit, "sh", "-c", f"printf '{source}' | aarch64-linux-gnu-g++ -std=c++20 -x c++ -o a -")
    assert compiled.returncode == 0, compiled.stderr
    assert "ARM aarch64" in images.run(kit, "file", "a").stdout
    certificates = os.environ.get("PIP_CERT")  # of a network that has its own
    volumes = (f"{certificates}:/run/certificates:ro",) if certificates else ()
    setting = ("PIP_CERT=/run/certificates",) if certificates else ()
    fetch = ("python3", "-m", "pip", "download", "--only-binary=:all:", "--no-deps", "psutil")
    fetched = images.run(kit, "env", *setting, *fetch, "--platform", "manylinux2014_aarch64", volumes=volumes)
    assert fetched.returncode == 0, fetched.stderr
    assert "aarch64.whl" in images.run(kit, "ls").stdout


def test_the_kit_image_holds_the_command_and_the_packers(images: Images, kit: str) -> None:
    assert images.run(kit, "id", "-u").stdout.strip() == str(USER)
    assert "usage: rankship VERB" in images.run(kit, "rankship", "--help").stdout
    assert "this-machine" in images.run(kit, "rankship", "devices").stdout
    assert images.run(kit, "sh", "-c", "dpkg-deb --version && zstd --version").returncode == 0


def test_compose_gives_no_privilege_and_a_network_of_its_own() -> None:
    import yaml

    text = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())
    assert text["networks"]["bench"]["internal"] is True
    for name, service in text["services"].items():
        assert not {"privileged", "ports", "cap_add", "pid"} & set(service), name
        assert (ROOT / "docker" / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
    sides = {name: [volume.split(":")[0] for volume in text["services"][name]["volumes"]] for name in ("pi", "host")}
    assert not set(sides["pi"]) & set(sides["host"]), "neither side sees the other's private key"
