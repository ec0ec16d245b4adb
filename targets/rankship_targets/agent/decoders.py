"""Drives files that generate: a decoder takes tokens one after the other and keeps what it has seen in a cache.

What each format's file takes is described where it is written, in the pipeline's room `export/decoders`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

from .delegates import open_interpreter, open_onnx_session
from .protocol import Fault
from .runtimes import LITERT_MODULES, find_runtime

Array = Any  # of numpy
CONTEXT = "context"  # the name under which an ONNX file says how many tokens it takes


class Decoder(Protocol):
    """One sequence in one file: `position` tokens are seen, of at most `context` (None: the file does not say)."""

    context: int | None
    position: int

    def rewind(self, position: int) -> None:
        """Forget all tokens from a position on; 0 begins anew."""

    def step(self, tokens: Array) -> Array:
        """Take tokens (n,) int64 at the next places; the logits (vocabulary,) float32 after the last of them.

        Fault bad_input where they are none, or more than the context has room for.
        """


class Grown:
    """onnxruntime: the cache goes in and out of every run, and stays in the runtime's memory."""

    def __init__(self, path: str, threads: int, delegate: str | None = None) -> None:
        import numpy as np
        import onnxruntime

        self._numpy, self._values = np, onnxruntime.OrtValue.ortvalue_from_numpy
        self._session = open_onnx_session(path, threads, delegate)
        told = self._session.get_modelmeta().custom_metadata_map.get(CONTEXT)
        self.context: int | None = int(told) if told else None
        self._inputs = [one.name for one in self._session.get_inputs()]
        self._outputs = [one.name for one in self._session.get_outputs()]
        self._empty = {
            one.name: self._values(np.zeros([side if isinstance(side, int) else 0 for side in one.shape], np.float32))
            for one in self._session.get_inputs()
            if one.name.startswith("past_key_values.")
        }
        self._past: dict[str, Any] = self._empty
        self.position = 0

    def rewind(self, position: int) -> None:
        """Forget all tokens from a position on."""
        check_rewind(self, position)
        if position == 0:
            self._past = self._empty
        elif position < self.position:
            self._past = {name: self._values(one.numpy()[:, :, :position].copy()) for name, one in self._past.items()}
        self.position = position

    def step(self, tokens: Array) -> Array:
        """Take tokens; the logits after the last of them."""
        check_tokens(self, tokens)
        np, end = self._numpy, self.position + len(tokens)
        given = {
            "input_ids": tokens.astype(np.int64).reshape(1, -1),
            "attention_mask": np.ones((1, end), np.int64),
            "position_ids": np.arange(self.position, end).reshape(1, -1),
        }
        bound = self._session.io_binding()
        for name in self._inputs:
            if name in self._past:
                bound.bind_ortvalue_input(name, self._past[name])
            else:
                bound.bind_cpu_input(name, given[name])
        for name in self._outputs:
            bound.bind_output(name, "cpu")
        self._session.run_with_iobinding(bound)
        made = dict(zip(self._outputs, bound.get_outputs()))  # noqa: B905 - Python 3.9 knows no strict
        logits = made.pop("logits").numpy()
        self._past = {name.replace("present.", "past_key_values."): one for name, one in made.items()}
        self.position = end
        return np.array(logits[0, -1], np.float32)


class Signed:
    """TensorFlow Lite's Python interface: signatures of several lengths, between which the cache is handed on.

    All tokens but the last go through `prefill_N`, filled up to N where the context has room; the last
    goes through `decode`.
    """

    def __init__(self, module: str, path: str, threads: int, delegate: str | None = None) -> None:
        import numpy as np

        self._numpy = np
        interpreter = open_interpreter(module, path, threads, delegate)
        names = interpreter.get_signature_list()
        self._interpreter = interpreter  # its signatures live as long as it does
        self._decode = interpreter.get_signature_runner("decode")
        lengths = sorted(int(name[len("prefill_") :]) for name in names if name.startswith("prefill_"))
        self._prefills = [(one, interpreter.get_signature_runner(f"prefill_{one}")) for one in lengths]
        details = self._decode.get_input_details()
        self.context: int | None = int(details["mask"]["shape"][-1])
        self._cache = {
            name: np.zeros(one["shape"], np.float32) for name, one in details.items() if name.startswith("kv_cache_")
        }
        self.position = 0

    def rewind(self, position: int) -> None:
        """Forget all tokens from a position on."""
        check_rewind(self, position)
        self.position = position  # what lies beyond is masked until it is written over

    def step(self, tokens: Array) -> Array:
        """Take tokens; the logits after the last of them."""
        check_tokens(self, tokens)
        rest = tokens[:-1]
        while len(rest):
            length, runner = self._choose(len(rest))
            self._run(runner, rest[:length], length)
            rest = rest[length:]
        return self._numpy.array(self._run(self._decode, tokens[-1:], 1)["logits"][0, -1], self._numpy.float32)

    def _choose(self, count: int) -> tuple[int, Any]:
        """The shortest signature that takes them all, else the longest; the context must have room for its length."""
        room = (self.context or 0) - self.position
        fitting = [one for one in self._prefills if one[0] <= room]
        whole = [one for one in fitting if one[0] >= count]
        return whole[0] if whole else fitting[-1] if fitting else (1, self._decode)

    def _run(self, runner: Any, tokens: Array, length: int) -> dict[str, Array]:  # noqa: ANN401 - the runtime's own
        np, start = self._numpy, self.position
        given = np.zeros((1, length), np.int32)
        given[0, : len(tokens)] = tokens
        places = np.arange(start, start + length, dtype=np.int32)
        mask = np.where(np.arange(self.context)[None] <= places[:, None], 0.0, -1e9).astype(np.float32)
        made: dict[str, Array] = runner(tokens=given, input_pos=places, mask=mask[None, None], **self._cache)
        self._cache = {name: made[name] for name in self._cache}
        self.position = start + len(tokens)
        return made


class Kept:
    """ExecuTorch's C++ binding: the cache is inside the file's method, which writes at the places that it is told."""

    def __init__(self, path: str, threads: int, _: str | None = None) -> None:
        import torch
        from executorch.extension.pybindings import _C as binding  # noqa: N811 - a module

        torch.set_num_threads(threads)
        binding._unsafe_reset_threadpool(threads)  # noqa: SLF001 - there is no other way
        self._torch = torch
        self._module = binding._load_for_executorch(path)  # noqa: SLF001 - as above
        self.context: int | None = int(self._module.run_method("get_max_seq_len", [])[0])
        self.position = 0

    def rewind(self, position: int) -> None:
        """Forget all tokens from a position on."""
        check_rewind(self, position)
        self.position = position  # what lies beyond is masked until it is written over

    def step(self, tokens: Array) -> Array:
        """Take tokens; the logits after the last of them."""
        check_tokens(self, tokens)
        torch, end = self._torch, self.position + len(tokens)
        given = torch.from_numpy(tokens.astype("int64").reshape(1, -1))
        (logits,) = self._module.run_method("forward", [given, torch.arange(self.position, end)])
        self.position = end
        return logits[0, -1].clone().numpy()


def check_tokens(decoder: Decoder, tokens: Array) -> None:
    """Check that there is a token and room for all; Fault bad_input if not."""
    count, context = len(tokens), decoder.context
    if count == 0:
        raise Fault("bad_input", "no token was given")
    if context is not None and decoder.position + count > context:
        raise Fault("bad_input", f"{decoder.position + count} tokens do not fit the context of {context}")


def check_rewind(decoder: Decoder, position: int) -> None:
    """Check that a position was seen; Fault bad_input if not."""
    if not 0 <= position <= decoder.position:
        raise Fault("bad_input", f"cannot go back to token {position} of {decoder.position}")


# A runtime's distribution, as in runtimes.py, and what drives its files that generate.
DRIVERS: dict[str, Callable[[str, int, str | None], Decoder]] = {
    "onnxruntime": Grown,
    **{name: partial(Signed, module) for name, module in LITERT_MODULES.items()},
    "executorch": Kept,
}


def open_decoder(artifact_format: str, path: str, threads: int, delegate: str | None = None) -> Decoder:
    """Open a file that generates in the best installed runtime, nothing seen yet.

    Fault lacks_runtime without a runtime, bad_artifact where it cannot load the file.
    """
    found = find_runtime(artifact_format)
    if found is None:
        raise Fault("lacks_runtime", f"no runtime for {artifact_format} is installed")
    name, version, _ = found
    try:
        return DRIVERS[name](path, threads, delegate)
    except Fault:
        raise
    except ImportError as failure:
        raise Fault("lacks_runtime", f"{name} {version} cannot be imported: {failure}") from failure
    except Exception as failure:
        raise Fault("bad_artifact", f"{path}: {type(failure).__name__}: {failure}") from failure
