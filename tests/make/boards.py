"""A device to measure on whose sensors are files, with everything on it that a trial needs."""

import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from make.artifacts import make_request, sign
from make.devices import BOOT_ID, COLD, GOVERNOR, HEAT, HOT, write_rooted_python, write_sensors
from make.onnx_files import save_product
from rankship_targets.client.detached import Ticket
from rankship_targets.devices.device import Device
from rankship_targets.session.session import open_session
from rankship_targets.trials.trial import Trial


class WarmBoard:
    """A device that is too warm to measure until `cool` is called, reached as its inventory entry says."""

    def __init__(self, folder: Path, device: Device) -> None:
        root = folder / "root"
        self.heat, self.boot, self.governor = root / HEAT, root / BOOT_ID, root / GOVERNOR
        write_sensors(root, heat=HOT, boot_id="first", governor="ondemand")
        python = write_rooted_python(folder)
        self.workdir = folder / "work"
        self.device = replace(device, python=str(python), workdir=str(self.workdir), cool_below_mc=50_000)
        self.model = save_product(folder / "tiny.onnx")

    def cool(self) -> None:
        self.heat.write_text(COLD)

    def measure(self, on_news: Callable[[str], None], ticket: Ticket | None = None, **changes: Any) -> Trial:  # noqa: ANN401
        """Push, measure and forget, as a run does with one artifact."""
        verified = sign(self.model)
        with open_session(self.device, on_news=on_news) as held:
            artifact, inputs = held.push(self.model, verified), held.push_file(self.model.with_name("x.npy"))
            return held.measure(make_request(artifact, verified.artifact_sha256, [inputs], **changes), ticket)

    def folders(self) -> list[Path]:
        return list((self.workdir / "runs").iterdir())

    def state(self) -> dict[str, Any]:
        (folder,) = self.folders()
        state: dict[str, Any] = json.loads((folder / "state.json").read_text())
        return state

    def kill(self) -> None:
        os.kill(self.state()["pid"], signal.SIGKILL)

    def events(self, name: str) -> int:
        (folder,) = self.folders()
        lines = (folder / "events.jsonl").read_text().splitlines()
        return sum(json.loads(line)["event"] == name for line in lines)
