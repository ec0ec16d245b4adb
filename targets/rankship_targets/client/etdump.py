"""Reads an ETDump of a device's ExecuTorch program on this host: the device has no tools for it."""

import base64
import os
import subprocess

from rankship_pipeline.foundation.errors import AgentMismatch, Lacks
from rankship_targets.agent.main import NOISE
from rankship_targets.agent.profiles import list_operators
from rankship_targets.trials.events import OperatorTime, Profiled

_IDENTIFIER = b"ED00"  # the format's, after the sizes of the file and the root table
_INFERENCE = "Method::execute"


def read_etdump(text: str, runs: int) -> Profiled:
    """Read the last `runs` inferences of an ETDump in base64: every operator, and each whole inference, in ns.

    Lacks if ExecuTorch is not installed here, AgentMismatch if the text is not an ETDump of so many inferences.
    """
    for name, value in NOISE.items():  # silences messages of its import
        os.environ.setdefault(name, value)
    try:
        from executorch.devtools.etdump.serialize import deserialize_from_etdump_flatcc
    except ImportError as failure:
        hint = "run `pip install executorch`"
        raise Lacks(f"reading an ETDump needs executorch.devtools on this host: {failure}", hint=hint) from None
    try:
        content = base64.b64decode(text, validate=True)
        dump = deserialize_from_etdump_flatcc(content) if content[8:12] == _IDENTIFIER else None
    except (ValueError, RuntimeError, OSError, KeyError, TypeError, subprocess.SubprocessError) as failure:
        raise _refuse(f"it cannot be read: {failure}") from None
    if dump is None:  # refused here, because the reader would print pages about it
        raise _refuse("it has another format")
    inferences = [
        event.profile_event.end_time - event.profile_event.start_time
        for run in dump.run_data
        for event in run.events or ()
        if event.profile_event is not None and event.profile_event.name == _INFERENCE
    ]
    if len(inferences) < runs:
        raise _refuse(f"it holds {len(inferences)} inferences, expected {runs}")
    operators = tuple(OperatorTime(name=name, kind=kind, ns=tuple(ns)) for name, kind, ns in list_operators(dump, runs))
    return Profiled(event="profiled", operators=operators, inference_ns=tuple(inferences[-runs:]))


def _refuse(why: str) -> AgentMismatch:
    return AgentMismatch(f"the device sent an ETDump, but {why}", hint="build and install its kit again")
