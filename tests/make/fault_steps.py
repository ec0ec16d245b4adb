"""The steps of a session that faults disturb, and what they must not leave behind."""

import os
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from make.artifacts import make_request, sign
from make.devices import COLD, HOT
from make.faults import TRUE_LIMITS
from make.networked_boards import NetworkedBoard
from rankship_pipeline.foundation.artifact_key import ArtifactKey
from rankship_pipeline.foundation.files import hash_file
from rankship_pipeline.foundation.formats import Format
from rankship_targets.client.detached import Ticket, make_ticket
from rankship_targets.session.manifest import SUFFIX as MANIFEST_SUFFIX
from rankship_targets.session.session import Session
from rankship_targets.trials.trial import Trial

ARTIFACT_BYTES, TOLD_BYTES = 12_000_000, 5_000_000  # a push is disturbed once so many bytes are on their way
WIDTH, OUTPUTS, SAMPLES = 8, 50_000, 80  # outputs of 16 MB come home
MEASURE_TIMEOUT_S = 60.0 if TRUE_LIMITS else 15.0


class Step:
    """One step of a session, disturbed once: in the middle of it or before it begins."""

    def __init__(
        self, name: str, folder: Path, board: NetworkedBoard, disturb: Callable[[], None] | None, *, before: bool
    ) -> None:
        self.name = name
        self.into = folder / "home"
        self.ticket: Ticket = make_ticket()
        self.kind: Format = "onnx"
        self.trial: Trial | None = None
        self._board = board
        self._disturb = disturb
        self._before = before
        self._model = make_wide_model(folder)
        self.artifact = folder / "artifact.onnx"
        if name == "push":
            self.artifact.write_bytes(os.urandom(ARTIFACT_BYTES))
        self.into.mkdir()

    def calm(self) -> None:
        """Be disturbed no more."""
        self._disturb, self.kind = None, "onnx"

    @property
    def _key(self) -> ArtifactKey:
        return ArtifactKey(variant="dense", format=self.kind)

    def prepare(self, held: Session) -> None:
        """Do what comes before the step."""
        if self.name in {"measure", "fetch"}:
            self._remote = held.push(self._model, sign(self._model, self._key))
            self._inputs = held.push_file(self._model.with_name("x.npy"))

    def act(self, held: Session) -> None:
        """Do the step and see that its result is right."""
        if self._before:
            self.strike()
        if self.name == "probe":
            held.probe()
        else:
            {"push": self._push, "measure": self._measure, "fetch": self._fetch}[self.name](held)

    def strike(self) -> None:
        """Let the fault come, once."""
        disturb, self._disturb = self._disturb, None
        if disturb is not None:
            disturb()

    def hear(self, news: str) -> None:
        """Take the session's news: the board is too warm, so the measurement is going on and waits."""
        if "cools down" in news:
            self.strike()
            self._board.heat.write_text(COLD)

    def _push(self, held: Session) -> None:
        def hear(sent_bytes: int, _: int) -> None:
            if sent_bytes >= TOLD_BYTES:
                self.strike()

        remote = held.push(self.artifact, sign(self.artifact), on_progress=hear)
        assert hash_file(self._board.work / Path(remote).relative_to(self._board.folder / "work")) == hash_file(
            self.artifact
        )

    def _measure(self, held: Session) -> None:
        if self._disturb is not None:
            self._board.heat.write_text(HOT)
        limits = {"max_warmup_ms": 500, "timeout_s": MEASURE_TIMEOUT_S}
        request = make_request(self._remote, hash_file(self._model), [self._inputs], self._key, **limits)
        self.trial = held.measure(request, self.ticket)
        assert len(self.trial.samples_ns) >= 20

    def _fetch(self, held: Session) -> None:
        over = threading.Event()

        def watch() -> None:
            while not over.wait(0.002):
                if any(path.stat().st_size for path in self.into.iterdir()):
                    self.strike()
                    return

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            (output,), _ = held.infer(self.kind, self._remote, [self._inputs], self.into)
        finally:
            over.set()
            watcher.join()
        assert np.load(output).shape == (SAMPLES, OUTPUTS)
        output.unlink()


def make_wide_model(folder: Path) -> Path:
    """Make a model of few weights and large outputs, and its inputs beside it."""
    weights = helper.make_tensor("w", TensorProto.FLOAT, [WIDTH, 1], [0.5] * WIDTH)
    ones = helper.make_tensor("s", TensorProto.INT64, [2], [1, OUTPUTS])
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Expand", ["h", "s"], ["y"])]
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, width])
        for name, width in (("x", WIDTH), ("y", OUTPUTS))
    ]
    graph = helper.make_graph(nodes, "wide", values[:1], values[1:], [weights, ones])
    onnx.save(helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 18)]), folder / "m.onnx")
    np.save(folder / "x.npy", np.ones((SAMPLES, WIDTH), np.float32))
    return folder / "m.onnx"


def list_halves(board: NetworkedBoard, step: Step) -> list[str]:
    """List what is not whole on the board: a part that is not its file's beginning, a hash that is not the name's."""
    found = []
    for path in board.work.rglob("*"):
        if path.suffix == ".part":
            content = path.read_bytes()
            if step.name != "push" or not step.artifact.read_bytes().startswith(content):
                found.append(str(path))
        elif path.is_file() and not path.name.endswith(MANIFEST_SUFFIX):
            named = [part for part in (path.stem, path.parent.name) if len(part) == 64]
            if named and hash_file(path) not in named:
                found.append(str(path))
    return found


def left_by_steps(board: NetworkedBoard) -> list[str]:
    """List what no session leaves behind when it ended as it should."""
    work = board.work / "rankship"
    left = [
        *work.rglob("*.part"),
        *work.glob("runs/*"),
        *work.glob("outputs/*"),
        *work.glob("lease"),
    ]
    return [str(path) for path in left]
