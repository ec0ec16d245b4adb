from pathlib import Path

import pytest
import torch

from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.models.data import Data, load_data
from rankship_pipeline.models.opened import open_sources
from rankship_pipeline.recipe.choices import DataChoice, Recipe, Source, list_sources
from rankship_pipeline.recipe.normalisation import Normalisation

NET = """
from torch import nn

def make():
    return nn.Linear(2, 2)

def train(model, seed):
    pass
"""
ROWS = [f"{index},{index / 2},{'yes' if index % 3 else 'no'}" for index in range(20)]
TABLE = "\n".join(["width,height,label", *ROWS])


def load(folder: Path, text: str = TABLE, **keys: object) -> Data:
    (folder / "t.csv").write_text(text)
    (folder / "net.py").write_text(NET)
    source = Source(name="m", factory="net.py:make", train="net.py:train")
    choice = DataChoice(**{"csv": "t.csv", **keys})  # type: ignore[arg-type]
    return load_data(
        Recipe(name="r", models=(source,), data=choice),
        folder,
        open_sources(
            list_sources(Recipe(name="r", models=(source,), data=choice)),
            folder,
            Recipe(name="r", models=(source,), data=choice).seed,
        ),
    )


def test_every_column_but_the_label_is_a_feature(tmp_path: Path) -> None:
    data = load(tmp_path)
    (features,) = data.test_inputs
    assert features.dtype == torch.float32
    assert features.shape == (10, 2)
    assert torch.equal(features[:, 0], 2 * features[:, 1])
    assert torch.equal(data.labels, (features[:, 0] % 3 != 0).to(torch.int64)), "no, yes: in sorted order"


def test_columns_are_taken_in_the_stated_order_and_normalised(tmp_path: Path) -> None:
    data = load(tmp_path, columns=("height", "width"), normalise=Normalisation(mean=(1, 2), std=(2, 4)))
    height, width = (data.test_inputs[0] * torch.tensor([2.0, 4]) + torch.tensor([1.0, 2])).T
    assert torch.equal(2 * height, width)


def test_spaces_around_a_label_are_no_part_of_it(tmp_path: Path) -> None:
    expected = load(tmp_path).labels
    assert torch.equal(load(tmp_path, TABLE.replace("no", " no ", 1)).labels, expected)


@pytest.mark.parametrize(
    ("text", "keys", "complaint"),
    [
        (TABLE, {"label": "class"}, "no column 'class'; it has width, height, label"),
        (TABLE, {"columns": ("depth",)}, "no column 'depth'"),
        (TABLE.replace("\n7,", "\n,"), {}, "line 9, column 'width': '' is no number"),
        (TABLE.replace("\n7,", "\n\n\n,"), {}, "line 11, column 'width': '' is no number"),
        (TABLE.replace("\n0,0.0,no", '\n0,0.0,"n\no"').replace("\n7,", "\n,"), {}, "line 10, column 'width'"),
        ("width,label\n", {}, "no rows"),
        (TABLE, {"normalise": Normalisation(mean=(0, 0, 0), std=(1, 1, 1))}, "3 means for 2 features"),
        (TABLE.replace("yes", "maybe", 1), {}, "3 classes .* the model has 2 outputs"),
    ],
)
def test_what_is_wrong_with_a_table_is_named(
    tmp_path: Path, text: str, keys: dict[str, object], complaint: str
) -> None:
    with pytest.raises(InputError, match=complaint):
        load(tmp_path, text, **keys)
