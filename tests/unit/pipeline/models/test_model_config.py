import json
import shutil
from pathlib import Path

import pytest

from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.models.model_config import complete_recipe, complete_source, read_class_names
from rankship_pipeline.recipe.choices import DataChoice, MergeChoice, Recipe, Source
from rankship_pipeline.recipe.normalisation import Normalisation


def test_task_and_inputs_come_from_the_models_own_files(tiny_models: Path) -> None:
    seeing, reading = (complete_source(Source(name="m", huggingface=name), tiny_models) for name in ("vit", "bert"))
    assert (seeing.task, seeing.inputs) == ("image-classification", ("pixel_values",))
    assert reading.task == "sequence-classification"
    assert reading.inputs == ("input_ids", "token_type_ids", "attention_mask")


def test_what_is_stated_stays(tiny_models: Path) -> None:
    source = Source(name="m", huggingface="bert", inputs=("input_ids", "attention_mask"))
    assert complete_source(source, tiny_models).inputs == ("input_ids", "attention_mask")
    factory = Source(name="m", factory="a.py:make", train="a.py:train")
    assert complete_source(factory, tiny_models) == factory


def test_an_input_that_the_model_does_not_take_is_left_out(tiny_models: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_models / "bert", tmp_path / "m")
    config = json.loads((tmp_path / "m/config.json").read_text())
    (tmp_path / "m/config.json").write_text(
        json.dumps({**config, "architectures": ["DistilBertForSequenceClassification"]})
    )
    source = complete_source(Source(name="m", huggingface="m"), tmp_path)
    assert source.inputs == ("input_ids", "attention_mask")


@pytest.mark.parametrize(
    ("classes", "complaint"),
    [(["BertForPreTraining"], "is a BertForPreTraining; "), ([], "of no class that its config.json names")],
)
def test_a_model_of_another_task_is_refused_with_what_there_is(
    tiny_models: Path, tmp_path: Path, classes: list[str], complaint: str
) -> None:
    shutil.copytree(tiny_models / "bert", tmp_path / "m")
    config = json.loads((tmp_path / "m/config.json").read_text())
    (tmp_path / "m/config.json").write_text(json.dumps({**config, "architectures": classes}))
    with pytest.raises(InputError, match=f"{complaint}.*sequence-classification, image-classification"):
        complete_source(Source(name="m", huggingface="m"), tmp_path)


def test_class_names_are_the_models_own_where_it_has_any(tiny_models: Path) -> None:
    assert read_class_names(Source(name="m", huggingface="vit"), tiny_models) == ("red", "green", "blue")
    assert read_class_names(Source(name="m", huggingface="grey"), tiny_models) == ()
    assert read_class_names(Source(name="m", huggingface="vit", labels=("a", "b", "c")), tiny_models) == ("a", "b", "c")


def test_a_base_is_completed_like_the_models_and_images_get_the_first_ones_normalisation(tiny_models: Path) -> None:
    source = Source(name="m", huggingface="vit")
    recipe = Recipe(
        name="r", models=(source,), data=DataChoice(images="x"), merge=MergeChoice(method="ties", base=source)
    )
    done = complete_recipe(recipe, tiny_models)
    assert done.merge.base is not None
    assert done.merge.base.task == "image-classification"
    assert done.data.normalise == Normalisation(mean=(0.5,) * 3, std=(0.25,) * 3)
    assert complete_recipe(done, tiny_models) == done
