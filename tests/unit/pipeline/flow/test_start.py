"""What `init` and `compress` write of a language model: its MLPs may lose neurons."""

import json
from pathlib import Path

import pytest

from rankship_pipeline.flow.start import suit_forms


def make_folder(folder: Path, architecture: str) -> str:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"architectures": [architecture]}))
    return str(folder)


@pytest.mark.parametrize(
    ("architectures", "forms"),
    [
        (["LlamaForCausalLM"], ["svd", "width"]),
        (["LlamaForCausalLM", "Qwen3ForCausalLM"], ["svd", "width"]),
        (["BertForSequenceClassification"], None),
        (["LlamaForCausalLM", "BertForSequenceClassification"], None),
        (["SomethingUnknown"], None),
    ],
)
def test_only_language_models_get_forms_of_their_own(
    tmp_path: Path, architectures: list[str], forms: list[str] | None
) -> None:
    folders = [make_folder(tmp_path / str(place), one) for place, one in enumerate(architectures)]
    assert suit_forms(folders).get("forms") == forms


def test_what_is_no_folder_here_is_left_to_the_recipes_defaults() -> None:
    assert suit_forms([None, "org/model"]) == {}
