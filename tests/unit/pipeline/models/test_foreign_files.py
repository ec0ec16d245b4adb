"""Files that are given as weights and are none: each is named, with what to give instead; none is ever run."""

import re
import shlex
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from rankship_pipeline.export.graph import trace_graph
from rankship_pipeline.export.onnx import export_graph
from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.models.foreign_files import is_graph
from rankship_pipeline.models.weights import load_into, read_state


def make_net() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


def save_keras(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("config.json", "{}")
        archive.writestr("model.weights.h5", b"")


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("w.h5", b"\x89HDF\r\n\x1a\n" + bytes(64), "HDF5 file"),
        ("w.tflite", b"\x1c\x00\x00\x00TFL3" + bytes(64), "a TFLite file, which is what comes out"),
        ("w.pte", b"\x1c\x00\x00\x00ET12" + bytes(64), "an ExecuTorch file"),
        ("w.gguf", b"GGUF\x03" + bytes(64), "a GGUF file"),
    ],
)
def test_a_file_of_another_format_is_named_by_its_first_bytes(
    tmp_path: Path, name: str, content: bytes, what: str
) -> None:
    for path in (tmp_path / name, tmp_path / "w.safetensors"):
        path.write_bytes(content)
        with pytest.raises(InputError, match=what) as caught:
            read_state(path)
        assert "as `factory`, its weights as safetensors" in caught.value.hint


def test_an_archive_of_another_format_is_named_by_what_it_holds(tmp_path: Path) -> None:
    save_keras(tmp_path / "w.keras")
    np.savez(tmp_path / "w.npz", a=np.ones(2))
    np.save(tmp_path / "w.npy", np.ones(2))
    for name, what in (("w.keras", "Keras archive"), ("w.npz", "archive of numpy arrays"), ("w.npy", "a numpy array")):
        with pytest.raises(InputError, match=what):
            read_state(tmp_path / name)


def test_an_onnx_file_is_named_whatever_its_name(tmp_path: Path) -> None:
    path = tmp_path / "weights.bin"
    export_graph(trace_graph(make_net().eval(), (torch.randn(1, 3),)), path)
    with pytest.raises(InputError, match="an ONNX file, which is what comes out"):
        read_state(path)


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's own, of its older format
def test_an_exported_program_is_named_and_its_command_writes_weights_that_fit(tmp_path: Path) -> None:
    module, path = make_net().eval(), tmp_path / "model one.pt2"
    torch.export.save(torch.export.export(module, (torch.randn(1, 3),)), path)
    with pytest.raises(InputError, match=r"a program of torch.export, a graph of operators") as caught:
        read_state(path)
    found = re.search(r"(python -c .*)$", caught.value.hint)
    assert found is not None
    exec(shlex.split(found.group(1))[2])  # noqa: S102 - the command that the user is given
    again = load_into(make_net(), read_state(path.with_suffix(".safetensors")), where="the converted file")
    x = torch.randn(5, 3)
    assert torch.equal(again(x), module(x))


def test_what_torch_makes_of_a_module_is_a_graph_and_the_module_is_none() -> None:
    module = make_net().eval()
    program = torch.export.export(module, (torch.randn(1, 3),))
    assert is_graph(program.module())
    assert is_graph(torch.export.unflatten(program))
    assert not is_graph(module)
