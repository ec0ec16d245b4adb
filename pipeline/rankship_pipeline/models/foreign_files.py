"""Names files of other formats that are given as weights, by their first bytes, and says what to give instead."""

import json
import shlex
import zipfile
from pathlib import Path

from torch import fx, jit, nn

_GIVE = "give the trained torch model: its code as `factory`, its weights as safetensors"
_MAGIC: tuple[tuple[int, bytes, str], ...] = (  # (offset, bytes, what such a file is)
    (0, b"\x89HDF\r\n\x1a\n", "an HDF5 file (.h5, as Keras writes it)"),
    (4, b"TFL3", "a TFLite file, which is what comes out, not what goes in"),
    (4, b"ET12", "an ExecuTorch file, which is what comes out, not what goes in"),
    (0, b"GGUF", "a GGUF file"),
    (0, b"\x93NUMPY", "a numpy array"),
)
_READ_BYTES = 64


def name_foreign(path: Path) -> tuple[str, str] | None:
    """What a file is and a hint, if it is of a known format that is neither safetensors nor a pickle; else None."""
    with path.open("rb") as stream:
        start = stream.read(_READ_BYTES)
    if start[8:9] == b"{":  # a safetensors file, if not a whole one
        return None
    names = _list_archive(path)
    if any(name.endswith("/archive_format") or name == "serialized_exported_program.json" for name in names):
        return (
            "is a program of torch.export, a graph of operators without layers, and reading it can run code",
            f"{_GIVE}, which this command writes (only if you trust the file's origin): {_write_conversion(path)}",
        )
    kinds = [what for offset, magic, what in _MAGIC if start[offset:].startswith(magic)]
    if path.suffix == ".onnx" or _is_onnx(start):
        kinds.append("an ONNX file, which is what comes out, not what goes in")
    if any(name.endswith(".h5") for name in names):
        kinds.append("a Keras archive")
    if names and all(name.endswith(".npy") for name in names):
        kinds.append("an archive of numpy arrays")
    return (f"is {kinds[0]}", _GIVE) if kinds else None


def _is_onnx(start: bytes) -> bool:
    """Whether a protobuf begins as ONNX models do: field 1, the version of the format, then the producer's name."""
    return len(start) > 3 and start[0] == 0x08 and start[1] < 0x40 and start[2] in {0x12, 0x3A}  # noqa: PLR2004


def _list_archive(path: Path) -> list[str]:
    if not zipfile.is_zipfile(path):
        return []
    with zipfile.ZipFile(path) as archive:
        return archive.namelist()


def _write_conversion(path: Path) -> str:
    """The shell command that writes an exported program's weights, by the model's own names, as safetensors."""
    target = path.with_suffix(".safetensors")
    code = (
        "import torch, safetensors.torch; "
        f"found = torch.export.load({json.dumps(str(path))}).state_dict; "
        "safetensors.torch.save_file({name: one.detach().clone().contiguous() for name, one in found.items()}, "
        f"{json.dumps(str(target))})"
    )
    return f"python -c {shlex.quote(code)}"


def is_graph(module: nn.Module) -> bool:
    """Whether a module is a graph of operators, as torch.export, torch.fx and TorchScript make it of a model."""
    kinds = {"UnflattenedModule", "InterpreterModule"}  # private classes of torch.export.unflatten
    return isinstance(module, fx.GraphModule | jit.ScriptModule) or type(module).__name__ in kinds
