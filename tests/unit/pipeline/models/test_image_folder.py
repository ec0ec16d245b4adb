import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.models.data import Data, load_data
from rankship_pipeline.models.model_config import complete_recipe, load_image_processor
from rankship_pipeline.models.opened import open_source, open_sources
from rankship_pipeline.recipe.choices import DataChoice, Recipe, Source, list_sources
from rankship_pipeline.recipe.normalisation import Normalisation

HALF = Normalisation(mean=(0.5,), std=(0.5,))
NET = """
import torch
from torch import nn

def make():
    return nn.Sequential(nn.Flatten(), nn.Linear({inputs}, 3))

def train(model, seed):
    pass
"""


def load(source: Source, choice: DataChoice, folder: Path) -> tuple[Recipe, Data]:
    recipe = complete_recipe(Recipe(name="r", models=(source,), data=choice), folder)
    return recipe, load_data(recipe, folder, open_sources(list_sources(recipe), folder, recipe.seed))


def load_plain(folder: Path, choice: DataChoice, inputs: int = 192) -> Data:
    (folder / "net.py").write_text(NET.format(inputs=inputs))
    return load(Source(name="m", factory="net.py:make", train="net.py:train"), choice, folder)[1]


def test_a_hugging_face_models_own_processor_prepares_the_images(tiny_models: Path, colours: Path) -> None:
    source = Source(name="m", huggingface="vit")
    recipe, data = load(source, DataChoice(images=str(colours)), tiny_models)
    processor = load_image_processor(source, tiny_models)
    assert processor is not None
    images = [Image.open(path) for name in ("blue", "green", "red") for path in sorted((colours / name).iterdir())]
    every = torch.cat([processor(images=[image], return_tensors="pt")["pixel_values"] for image in images])
    found = torch.cat([data.calibration["m"][0], data.test_inputs[0]])
    assert found.shape == every.shape == (36, 3, 16, 16)
    assert torch.equal(found.flatten(1).sum(1).sort().values, every.flatten(1).sum(1).sort().values)
    brightest = data.test_inputs[0].mean((2, 3)).argmax(1)
    assert torch.equal(data.labels, brightest), "classes are the model's (red, green, blue), not the folders' order"
    assert recipe.data.normalise == Normalisation(mean=(0.5,) * 3, std=(0.25,) * 3)
    assert data.answers == "labels"


def test_another_normalisation_than_the_models_own_is_really_applied(tiny_models: Path, colours: Path) -> None:
    source, choice = Source(name="m", huggingface="vit"), DataChoice(images=str(colours))
    _, own = load(source, choice, tiny_models)
    _, other = load(source, DataChoice(images=str(colours), normalise=HALF), tiny_models)
    torch.testing.assert_close(other.test_inputs[0] * 0.5 + 0.5, own.test_inputs[0] * 0.25 + 0.5)


def test_a_model_of_grey_images_gets_one_channel(tiny_models: Path, colours: Path) -> None:
    _, data = load(Source(name="m", huggingface="grey"), DataChoice(images=str(colours)), tiny_models)
    assert data.test_inputs[0].shape == (18, 1, 16, 16)


def test_a_stated_size_replaces_the_models_own(tiny_models: Path, colours: Path) -> None:
    _, data = load(Source(name="m", huggingface="vit"), DataChoice(images=str(colours), size=(16, 24)), tiny_models)
    assert data.test_inputs[0].shape == (18, 3, 16, 24)
    assert data.test_inputs[0].min() < -0.9, "still normalised as the model wants it"


def test_a_factory_gets_the_stated_size_channels_and_normalisation(tmp_path: Path, colours: Path) -> None:
    data = load_plain(tmp_path, DataChoice(images=str(colours), size=8, normalise=HALF))
    assert data.test_inputs[0].shape == (18, 3, 8, 8)
    values = sorted(set((data.test_inputs[0] * 0.5 + 0.5).mul(255).round().flatten().int().tolist()))
    assert set(values) <= {40, *range(100, 220, 10)}, "pixels in [0, 1], then (pixel − 0.5) / 0.5"
    grey = load_plain(tmp_path, DataChoice(images=str(colours), size=8, channels=1), inputs=64)
    assert grey.test_inputs[0].shape == (18, 1, 8, 8)
    assert grey.test_inputs[0].min() >= 0
    counted = torch.cat([data.labels]).bincount(minlength=3)
    assert counted.sum() == 18


def test_a_photograph_is_turned_upright(tmp_path: Path) -> None:
    pixels = np.zeros((8, 16, 3), np.uint8)
    pixels[:, :8] = 255  # light on the left
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise: light above
    for number in range(16):
        path = tmp_path / f"p/0/{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path, exif=exif)
    data = load_plain(tmp_path, DataChoice(images="p"), inputs=3 * 16 * 8)
    assert data.test_inputs[0].shape == (8, 3, 16, 8)
    assert data.test_inputs[0][:, :, :8].min() == 1
    assert data.test_inputs[0][:, :, 8:].max() == 0


def test_without_class_folders_the_models_own_answers_stand_for_labels(tiny_models: Path, tmp_path: Path) -> None:
    for number in range(20):
        Image.new("RGB", (16, 16), (12 * number, 100, 200)).save(tmp_path / f"{number}.png")
    source = Source(name="m", huggingface="vit")
    recipe, data = load(source, DataChoice(images=str(tmp_path)), tiny_models)
    assert data.answers == "predictions"
    model: nn.Module = open_source(recipe.models[0], tiny_models, 0).make()
    model.load_state_dict(open_source(recipe.models[0], tiny_models, 0).load_state())
    with torch.inference_mode():
        assert torch.equal(data.labels, model(*data.test_inputs).argmax(-1))


def _break(folder: Path) -> None:
    (folder / "red/00.png").write_bytes(b"no image")
    (folder / "red/01.png").write_bytes((folder / "green/01.png").read_bytes()[:60])


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (shutil.rmtree, "no folder"),
        (lambda folder: [path.unlink() for path in folder.rglob("*.png")], "no image in"),
        (
            lambda folder: [path.unlink() for path in (folder / "red").iterdir()],
            "no image in the folder of class 'red'",
        ),
        (lambda folder: shutil.copy(folder / "red/00.png", folder), "1 images lie beside the classes' folders"),
        (lambda folder: (folder / "red").rename(folder / "crimson"), "the model has no class 'crimson'"),
        (_break, r"red/0[01]\.png cannot be read as an image"),
        (lambda folder: [path.unlink() for path in folder.rglob("*[2-9].png")], "12 samples; at least 16"),
    ],
)
def test_what_is_wrong_with_a_folder_is_named(
    spoil: object, complaint: str, tiny_models: Path, colours: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "colours"
    shutil.copytree(colours, folder)
    assert callable(spoil)
    spoil(folder)
    with pytest.raises(InputError, match=complaint):
        load(Source(name="m", huggingface="vit"), DataChoice(images=str(folder)), tiny_models)


def test_images_of_many_sizes_need_one(tmp_path: Path, colours: Path) -> None:
    with pytest.raises(InputError, match=r"others \[3") as caught:
        load_plain(tmp_path, DataChoice(images=str(colours)))
    assert "state `size`" in caught.value.hint


def test_a_model_of_text_takes_no_images(tiny_models: Path, colours: Path) -> None:
    with pytest.raises(InputError, match="model 'm' is for sequence-classification and takes no images"):
        load(Source(name="m", huggingface="bert"), DataChoice(images=str(colours)), tiny_models)
