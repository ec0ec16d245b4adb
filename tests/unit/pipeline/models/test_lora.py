"""LoRA adapters as peft saves them: what is loaded computes what peft's own model computes."""

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from make.berts import save_bert
from rankship_pipeline.flow.preflight import prepare
from rankship_pipeline.flow.stages import Stages
from rankship_pipeline.foundation.console import Steps
from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.foundation.store import Store
from rankship_pipeline.models.lora import WEIGHTS, read_adapter
from rankship_pipeline.models.lora_config import CONFIG
from rankship_pipeline.models.opened import open_source
from rankship_pipeline.models.skeleton import read_skeleton
from rankship_pipeline.models.weights import copy_state, load_into
from rankship_pipeline.recipe.choices import Source, find_base, list_sources
from rankship_pipeline.recipe.rules import read_recipe

MODELS = """
[[models]]
name = "{name}"
huggingface = "base"
adapter = "{name}"
task = "sequence-classification"
inputs = ["input_ids", "attention_mask"]
"""
RECIPE = """
name = "adapters"
[merge]
method = "{method}"
{keys}
[data]
loader = "data.py:load"
[budget]
kept_parameters = 0.9
[ranks]
step = 1
[export]
formats = ["onnx"]
"""
DATA = """
import torch

def load():
    ids = torch.randint(0, 50, (24, 6), generator=torch.Generator().manual_seed(0))
    inputs = (ids, torch.ones_like(ids))
    return {"calibration": {"one": inputs, "two": inputs}, "test_inputs": inputs, "test_labels": torch.arange(24) % 3}
"""


def save_adapter(base: Path, folder: Path, seed: int, **options: Any) -> Tensor:  # noqa: ANN401 - LoraConfig's own
    """A LoRA of random numbers on the saved base, and the logits of peft's own model for some ids."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(base)
    config = peft.LoraConfig(
        task_type="SEQ_CLS", r=2, lora_alpha=6, **{"target_modules": ["query", "dense"], **options}
    )
    adapted = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    adapted.save_pretrained(str(folder))
    with torch.no_grad():
        logits: Tensor = adapted.eval()(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
    return logits


IDS = torch.arange(18).reshape(3, 6)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    sizes = {"vocab_size": 50, "hidden_size": 12, "num_hidden_layers": 1, "max_position_embeddings": 16}
    save_bert(folder / "base", **sizes)
    (folder / "data.py").write_text(DATA)
    return folder


def make_source(name: str) -> Source:
    return Source(
        name=name,
        huggingface="base",
        adapter=name,
        task="sequence-classification",
        inputs=("input_ids", "attention_mask"),
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"alpha_pattern": {"query": 4}, "rank_pattern": {"query": 3}},
        {"target_modules": ["word_embeddings", "value"]},
        {"bias": "lora_only"},
    ],
    ids=["plain", "rslora", "patterns", "embedding", "bias"],
)
def test_a_loaded_adapter_gives_pefts_own_logits(base: Path, options: dict[str, Any], request: Any) -> None:  # noqa: ANN401
    name = request.node.callspec.id
    expected = save_adapter(base / "base", base / name, seed=1, **options)
    source = make_source(name)
    model = load_into(open_source(source, base, 0).make(), open_source(source, base, 0).load_state(), where=name)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS, torch.ones_like(IDS)), expected, rtol=1e-4, atol=1e-5)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3)
        self.fc = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, 3, 6, 6) to (batch, 2)."""
        logits: Tensor = self.fc(self.conv(x).mean((2, 3)))
        return logits


def test_convolutions_have_adapters_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, x = Net(), torch.randn(2, 3, 6, 6)
    state = copy_state(net)
    adapted = peft.get_peft_model(net, peft.LoraConfig(r=2, target_modules=["conv", "fc"], init_lora_weights=False))
    adapted.save_pretrained(str(tmp_path))
    loaded = load_into(Net(), read_adapter(tmp_path).add_to(state), where="here")
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), adapted.eval()(x))
        assert not torch.allclose(load_into(Net(), state, where="here")(x), loaded(x), atol=1e-3)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, length, 8) to the same."""
        found: Tensor = self.attention(x, x, x)[0]
        return found


def test_an_adapter_of_torchs_attention_is_refused(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=["attention"], init_lora_weights=False)
    peft.get_peft_model(Attention(), config).save_pretrained(str(tmp_path))
    with pytest.raises(InputError, match=r"attention\.base_layer\.out_proj is a layer inside an adapted one"):
        read_adapter(tmp_path)


def test_a_tied_module_whose_halves_would_differ_is_refused(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    net[1].weight = net[0].weight
    config = peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    state, skeleton = copy_state(net), read_skeleton(net)
    peft.get_peft_model(net, config).save_pretrained(str(tmp_path))
    with pytest.raises(InputError, match=r"its model ties 0\.weight and 1\.weight"):
        read_adapter(tmp_path).add_to(state, skeleton)


def test_an_adapter_of_another_model_or_half_of_one_is_refused(base: Path, tmp_path: Path) -> None:
    save_adapter(base / "base", tmp_path / "whole", seed=3)
    with pytest.raises(InputError, match=r"does not fit its model, which lacks classifier\.bias"):
        read_adapter(tmp_path / "whole").add_to(copy_state(Net()))
    tensors = load_file(tmp_path / "whole" / WEIGHTS)
    shutil.copytree(tmp_path / "whole", tmp_path / "half")
    lost = next(name for name in tensors if "lora_B" in name)
    save_file({name: value for name, value in tensors.items() if name != lost}, tmp_path / "half" / WEIGHTS)
    with pytest.raises(InputError, match="has only one of lora_A and lora_B"):
        read_adapter(tmp_path / "half")
    with pytest.raises(InputError, match=r"no adapter_config\.json"):
        assert open_source(make_source("nowhere"), base, 0).sha256


def write_recipe(folder: Path, method: str, keys: str = "") -> Path:
    path = folder / f"{method}.toml"
    models = "".join(MODELS.format(name=name) for name in ("one", "two"))
    path.write_text(RECIPE.format(method=method, keys=keys) + models)
    return path


@pytest.fixture(scope="module")
def two(base: Path) -> Path:
    for seed, name in enumerate(("one", "two")):
        save_adapter(base / "base", base / name, seed=seed + 5, target_modules=["query", "value"])
    return base


def test_adapters_of_one_model_have_it_as_their_base(two: Path) -> None:
    recipe = read_recipe(write_recipe(two, "ctm"))
    found = find_base(recipe)
    assert found is not None
    assert (found.huggingface, found.adapter) == ("base", None)
    assert [source.name for source in list_sources(recipe)] == ["one", "two", "base"]


def test_a_recipe_refuses_another_kind_of_adapter_by_its_key(two: Path) -> None:
    save_adapter(two / "base", two / "two", seed=6, target_modules=["query", "value"], use_dora=True)
    with pytest.raises(InputError, match="`use_dora = true` is not supported"):
        prepare(read_recipe(write_recipe(two, "ctm")), two)
    save_adapter(two / "base", two / "two", seed=6, target_modules=["query", "value"])


def test_a_recipe_notes_another_base_than_the_one_named(two: Path) -> None:
    config = json.loads((two / "one" / CONFIG).read_text())
    (two / "one" / CONFIG).write_text(json.dumps({**config, "base_model_name_or_path": "owner/another"}))
    notes = prepare(read_recipe(write_recipe(two, "ctm")), two).notes
    (two / "one" / CONFIG).write_text(json.dumps(config))
    assert [note for note in notes if "says that it was trained on" in note] == [
        f"{two / 'one'} says that it was trained on owner/another: it is added to base"
    ]


def test_plain_addition_of_adapters_adds_both_changes(two: Path, tmp_path: Path) -> None:
    recipe = read_recipe(write_recipe(two, "task-arithmetic", "scale = 1"))
    stages = Stages(prepare(recipe, two), Store(tmp_path), Steps(quiet=True))
    merged, interference = stages.merge("task-arithmetic")
    assert len(interference) == len(stages.prepared.layers)
    base = load_file(two / "base" / "model.safetensors")
    name = "bert.encoder.layer.0.attention.self.query.weight"
    adapted = [read_adapter(two / one).add_to(base)[name].double() for one in ("one", "two")]
    expected = adapted[0] + adapted[1] - base[name]
    torch.testing.assert_close(merged.module.state_dict()["model." + name].double(), expected, rtol=0, atol=1e-6)
    ranks = [
        int(
            torch.linalg.matrix_rank(
                stages.merge(method)[0].module.state_dict()["model." + name] - base[name], atol=1e-5
            )
        )
        for method in ("ctm", "knots")
    ]
    assert 1 <= ranks[0] <= 2  # by construction no more than the adapters' own
    assert 1 <= ranks[1] <= 4
