"""Fixtures shared by all tests: a real OpenSSH server on the loopback, with keys and configuration of its own.

Its sessions have an empty home, so that nobody's dot files slow or colour the tests.
"""

import gc
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytest

from make.groups import pytest_collection_modifyitems, pytest_xdist_make_scheduler  # noqa: F401 - hooks
from make.skips import pytest_addoption, pytest_sessionfinish, pytest_terminal_summary  # noqa: F401 - hooks
from make.ssh_servers import CONFIGURATION, SSHD, SshServer, start_server
from rankship_pipeline.foundation.errors import RankshipError
from rankship_targets.devices.device import Device
from rankship_targets.twin.adbd import Screen
from rankship_targets.twin.android import find_root
from rankship_targets.twin.pixel import Phone, launch_phone, reach

# Tracing and converting make millions of objects among which the collector finds nothing: a tenth of an export's time.
gc.set_threshold(50_000, 20, 50)
os.environ["RANKSHIP_VERBOSE"] = "1"  # a verb hides the warnings of libraries; here each of them is an error
TWIN_NEEDS = {"qemu-aarch64-static": "qemu-user-static", "mmdebstrap": "mmdebstrap", "arch-test": "arch-test"}
TRY_A_ROOM = "from rankship_targets.twin.binfmt import enter_room; enter_room()"
# The least that can be asked of what stand-ins are made of: an empty root, and one small wheel.
TRY_DEBIAN = "mmdebstrap --quiet --mode=root --architectures=arm64 --variant=custom --skip=check/qemu bookworm"
TRY_PIP = "-m pip download --quiet --no-deps --no-cache-dir --only-binary=:all: --platform manylinux2014_aarch64 psutil"
STATES = itertools.count()
StartSshd = Callable[..., SshServer]
T = TypeVar("T")
MakeOrSkip = Callable[[Callable[[], T]], T]


@pytest.fixture(autouse=True)
def own_state(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the user's own configuration, signing key and quarantine away from every test.

    A state's folder is made by who writes there: `mktemp` would read all those before it, in every test.
    """
    base = tmp_path_factory.getbasetemp()
    monkeypatch.setenv("XDG_CONFIG_HOME", str(base / "configuration"))  # shared: what one test signs, all trust
    monkeypatch.setenv("XDG_STATE_HOME", str(base / "states" / str(next(STATES))))


@pytest.fixture(scope="session")
def start_sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartSshd]:
    if not SSHD.exists() or not shutil.which("ssh-keygen"):
        pytest.skip("no OpenSSH server here: apt-get install openssh-server openssh-client")
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # the server's privilege separation insists on it
    servers: list[SshServer] = []

    def start(configuration: str = CONFIGURATION, prefix: Sequence[str] = ()) -> SshServer:
        servers.append(start_server(tmp_path_factory.mktemp("sshd"), configuration, prefix))
        return servers[-1]

    yield start
    for server in servers:
        if server.process.poll() is None:
            server.stop()


@pytest.fixture(scope="session")
def sshd_configuration() -> str:
    """What servers are started with, for tests that change a line of it."""
    return CONFIGURATION


@pytest.fixture(scope="session")
def device_without_sftp(start_sshd: StartSshd) -> Device:
    """A board whose SSH server runs commands and copies nothing, as small ones do."""
    return start_sshd(CONFIGURATION.replace("Subsystem sftp internal-sftp", "")).device


@pytest.fixture(scope="session")
def ssh_server(start_sshd: StartSshd) -> SshServer:
    """Give the one server that tests share; whoever must break a server starts another."""
    return start_sshd()


@pytest.fixture(scope="session")
def able_machine() -> None:
    """Skip where this machine cannot run arm64 programs in a room of their own; it is tried, not guessed."""
    if os.geteuid() != 0:
        pytest.skip("emulated devices need root")
    missing = [package for program, package in TWIN_NEEDS.items() if not shutil.which(program)]
    if missing:
        pytest.skip(f"no emulated devices here: apt-get install {' '.join(missing)}")
    tried = subprocess.run([sys.executable, "-c", TRY_A_ROOM], capture_output=True, text=True, check=False)
    if tried.returncode != 0:
        pytest.skip(f"this machine refuses emulated devices a room: {_last_words(tried.stderr)}")


@pytest.fixture(scope="session")
def make_or_skip(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Callable[[], T]], T]:
    """Make what needs Debian's packages or a package index; skip where it fails and one of them does not answer."""

    def make(job: Callable[[], T]) -> T:
        try:
            return job()
        except RankshipError:
            folder = tmp_path_factory.mktemp("asked")
            commands = {"Debian mirror": [*TRY_DEBIAN.split(), str(folder / "root")]}
            commands["package index"] = [sys.executable, *TRY_PIP.split(), "--dest", str(folder)]
            for asked, command in commands.items():
                tried = subprocess.run(command, capture_output=True, text=True, check=False)
                if tried.returncode != 0:
                    pytest.skip(f"no {asked} answers: {_last_words(tried.stderr)}")
            raise

    return make


@pytest.fixture(scope="session")
def start_phone(able_machine: None, make_or_skip: MakeOrSkip[Path]) -> Iterator[Callable[..., Phone]]:  # noqa: ARG001 - it skips
    """Give what starts emulated phones; each ends with the tests."""
    if not shutil.which("adb"):
        pytest.skip("no adb here: apt-get install adb")
    make_or_skip(find_root)
    phones: list[Phone] = []

    def start(screen: Screen = "open") -> Phone:
        phones.append(launch_phone(screen))
        return phones[-1]

    yield start
    for phone in phones:
        phone.stop()


@pytest.fixture(scope="session")
def pixel(start_phone: Callable[..., Phone]) -> Device:
    """Give the one emulated phone that tests share; whoever must break a phone starts another."""
    return reach(start_phone(), Device(name="phone", transport="adb", serial="-"))


@pytest.fixture
def sftp_program_server(start_sshd: StartSshd) -> SshServer:
    """A server of its own whose copying is done by a program of its own, as on most boards."""
    program = Path("/usr/lib/openssh/sftp-server")
    if not program.exists():
        pytest.skip(f"no {program} here: apt-get install openssh-sftp-server")
    return start_sshd(CONFIGURATION.replace("internal-sftp", str(program)))


def _last_words(said: str) -> str:
    return " ".join(line.strip() for line in said.splitlines()[-2:]) or "without a word"


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders as save_pretrained writes them, without a hub: `vit` and `grey` see images, `bert` reads text.

    Their classes are called red, green and blue, but for `grey`, which names none.
    """
    import torch
    import transformers

    folder = tmp_path_factory.mktemp("models")
    names: dict[str, Any] = {
        "id2label": {0: "red", 1: "green", 2: "blue"},
        "label2id": {"red": 0, "green": 1, "blue": 2},
    }
    unnamed: dict[str, Any] = {"num_labels": 3}
    small: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
    }
    torch.manual_seed(0)
    seeing = transformers.ViTConfig(**small, image_size=16, patch_size=8, **names)
    transformers.ViTForImageClassification(seeing).save_pretrained(folder / "vit")
    grey = transformers.ViTConfig(**small, **unnamed, image_size=16, patch_size=8, num_channels=1)
    transformers.ViTForImageClassification(grey).save_pretrained(folder / "grey")
    for name, channels in (("vit", 3), ("grey", 1)):
        processor = transformers.ViTImageProcessor(
            size={"height": 16, "width": 16}, image_mean=[0.5] * channels, image_std=[0.25] * channels
        )
        processor.save_pretrained(folder / name)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "green", "blue", "thing"]
    (folder / "bert").mkdir()
    (folder / "bert/vocab.txt").write_text("\n".join(words) + "\n")
    transformers.BertTokenizer(str(folder / "bert/vocab.txt")).save_pretrained(folder / "bert")
    reading = transformers.BertConfig(**small, vocab_size=len(words), max_position_embeddings=16, **names)
    transformers.BertForSequenceClassification(reading).save_pretrained(folder / "bert")
    return folder


@pytest.fixture(scope="session")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 36 PNGs, a subfolder for each of three classes, of different sizes."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("colours")
    for channel, name in enumerate(("red", "green", "blue")):
        (folder / name).mkdir()
        for number in range(12):
            colour = [40, 40, 40]
            colour[channel] = 100 + 10 * number
            Image.new("RGB", (20 + number, 24), tuple(colour)).save(folder / name / f"{number:02}.png")
    return folder
