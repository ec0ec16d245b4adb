"""A session becomes a folder whose recipe builds the same."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn

import rankship as rs
from make import TESTS
from make.sessions import compress_recipe
from rankship_pipeline.flow.preflight import prepare
from rankship_pipeline.foundation.codec import decode
from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.foundation.records import RankPlan
from rankship_pipeline.recipe.rules import read_recipe

# In a process of its own, that knows nothing of the session: the plan on its last line.
COMPRESS = f"""
import sys
sys.path.insert(0, {str(TESTS)!r})
from pathlib import Path
from make.sessions import compress_recipe
from rankship_pipeline.foundation.codec import encode
print(encode(compress_recipe(Path(sys.argv[1]))[1]))
"""


def test_a_recipe_in_a_folder_builds_the_same_plan_in_another_process(
    tmp_path: Path, net_module: type[nn.Module], inputs: Tensor
) -> None:
    torch.manual_seed(0)
    small = rs.compress(net_module(), inputs, kept_parameters=0.5, progress=False)
    written = small.to_recipe(tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "data.py",
        "data.safetensors",
        "model.safetensors",
        "recipe.toml",
        "user_net.py",
    ]
    assert rs.Recipe.read(tmp_path / "out/recipe.toml") == written
    command = [sys.executable, "-c", COMPRESS, str(tmp_path / "out/recipe.toml")]
    done = subprocess.run(command, cwd="/", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert decode(RankPlan, done.stdout.splitlines()[-1], where="the process") == small.plan


def test_a_merge_with_tests_and_a_base_becomes_a_folder(
    tmp_path: Path, net_module: type[nn.Module], inputs: Tensor
) -> None:
    nets = []
    for seed in range(3):
        torch.manual_seed(seed)
        nets.append(net_module())
    labels = torch.arange(80) % 6
    one = rs.merge(
        {"first one": nets[0], "first-one": nets[1]},
        {"first one": inputs, "first-one": -inputs},
        method="task-arithmetic",
        base=nets[2],
        test=(inputs, labels),
        unlabelled={"first one": inputs, "first-one": -inputs},
        progress=False,
    )
    small = rs.compress(one, kept_parameters=0.5, progress=False)
    small.to_recipe(tmp_path / "out")
    prepared = prepare(read_recipe(tmp_path / "out/recipe.toml"), tmp_path / "out")
    assert torch.equal(prepared.data.labels, labels)
    assert torch.equal(prepared.data.unlabelled["first-one"][0], -inputs)
    assert compress_recipe(tmp_path / "out" / "recipe.toml")[1] == small.plan


def test_a_transformers_model_is_written_as_its_library_does(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=8,
        patch_size=4,
    )
    pictures = torch.randn(24, 3, 8, 8)
    model = transformers.ViTForImageClassification(config)
    ranks = rs.RankChoice(step=2, exclude=("vit.embeddings.*",))
    small = rs.compress(model, pictures, kept_parameters=0.8, ranks=ranks, progress=False)
    recipe = small.to_recipe(tmp_path / "out")
    assert recipe.models[0].task == "image-classification"
    assert recipe.models[0].inputs == ("pixel_values",)
    plan = compress_recipe(tmp_path / "out" / "recipe.toml")[1]
    assert [layer.factors for layer in plan.layers] == [layer.factors for layer in small.plan.layers]
    assert small.plan.factors


def test_without_a_folder_the_recipe_itself_is_given(net: nn.Module, inputs: Tensor) -> None:
    small = rs.compress(net, inputs, kept_parameters=0.5, progress=False)
    assert small.to_recipe() == small.recipe
    assert small.recipe.models == (rs.Source(name="model", held=True),)


def test_what_nothing_can_make_again_needs_a_factory(net: nn.Module, inputs: Tensor, tmp_path: Path) -> None:
    class Typed(nn.Sequential):
        """As typed into a notebook."""

    assert isinstance(net, nn.Sequential)
    small = rs.compress(Typed(*net), inputs, kept_parameters=0.5, progress=False)
    with pytest.raises(InputError, match=r"Typed is typed into this session") as caught:
        small.to_recipe(tmp_path / "out")
    assert "factory=" in caught.value.hint
    (tmp_path / "make_it.py").write_text(
        "from torch import nn\n\ndef make():\n"
        "    return nn.Sequential(nn.Linear(20, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 6))\n"
    )
    small.to_recipe(tmp_path / "out", factory=f"{tmp_path / 'make_it.py'}:make")
    assert compress_recipe(tmp_path / "out" / "recipe.toml")[1] == small.plan


def test_a_factory_that_makes_something_else_is_refused(
    net: nn.Module, inputs: Tensor, tmp_path: Path, net_module: type[nn.Module]
) -> None:
    small = rs.compress(net, inputs, kept_parameters=0.5, progress=False)
    with pytest.raises(InputError, match="does not fit"):
        small.to_recipe(tmp_path / "out", factory=net_module)
    with pytest.raises(InputError, match=r"no file .*gone\.py"):
        small.to_recipe(tmp_path / "out", factory=f"{tmp_path / 'gone.py'}:make")
    with pytest.raises(InputError, match="without arguments"):
        small.to_recipe(tmp_path / "out", factory=nn.Linear)


def test_the_table_of_costs_comes_along(
    tmp_path: Path, net_module: type[nn.Module], inputs: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tables").mkdir()
    Path("tables/pi.json").write_text("{}")
    origin = rs.compress(net_module(), inputs, kept_parameters=0.5, progress=False).find_origin()
    timed = origin.change(progress=False, budget=rs.Budget(latency_us=9, costs="tables/pi.json"))
    written = timed.write_recipe(tmp_path / "out", None)
    assert written.budget.costs == "costs.json"
    assert (tmp_path / "out/costs.json").read_text() == "{}"
    assert rs.Recipe.read(tmp_path / "out/recipe.toml") == written


def test_a_factory_whose_other_files_would_stay_behind_is_refused(
    net: nn.Module, inputs: Tensor, tmp_path: Path
) -> None:
    small = rs.compress(net, inputs, kept_parameters=0.5, progress=False)
    (tmp_path / "parts.py").write_text("")
    (tmp_path / "make_it.py").write_text(
        "from torch import nn\nimport parts\n\ndef make():\n    return nn.Linear(1, 1)\n"
    )
    with pytest.raises(InputError, match=r"imports parts from beside it"):
        small.to_recipe(tmp_path / "out", factory=f"{tmp_path / 'make_it.py'}:make")


def test_a_file_of_code_that_lies_in_the_folder_is_not_replaced(net: nn.Module, inputs: Tensor, tmp_path: Path) -> None:
    small = rs.compress(net, inputs, kept_parameters=0.5, progress=False)
    for name in ("model.py", "make_it.py"):
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / name).write_text("MINE = 1\n")
    (tmp_path / "make_it.py").write_text("def make(): ...\n")
    for factory in (nn.Sequential, f"{tmp_path / 'make_it.py'}:make"):
        with pytest.raises(InputError, match="is there already, with other content"):
            small.to_recipe(tmp_path / "out", factory=factory)
    assert {path.read_text() for path in (tmp_path / "out").iterdir()} == {"MINE = 1\n"}
