"""What an adapter's configuration may say: every key is supported, changes no number, or is refused by name."""

import json
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.models import lora_config
from rankship_pipeline.models.lora import WEIGHTS, list_adapter_files, read_adapter
from rankship_pipeline.models.lora_config import CONFIG, read_lora_config

PLAIN = {"peft_type": "LORA", "r": 2, "lora_alpha": 3}


def write(folder: Path, **keys: Any) -> Path:  # noqa: ANN401 - what JSON holds
    (folder / CONFIG).write_text(json.dumps({**PLAIN, **keys}))
    return folder / CONFIG


@pytest.mark.parametrize(
    ("keys", "hint"),
    [
        ({"peft_type": "IA3"}, "merge_and_unload"),
        ({"peft_type": "PREFIX_TUNING"}, "no merged model exists"),
        ({"use_dora": True}, "merge_and_unload"),
        ({"init_lora_weights": "pissa"}, "merge_and_unload"),
        ({"init_lora_weights": "pissa_niter_4"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "corda"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "lora_ga"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "loftq"}, "the quantised model that it began with"),
        ({"init_lora_weights": "invented"}, "path_initial_model_for_weight_conversion"),
        ({"bias": "some"}, "merge_and_unload"),
        ({"alora_invocation_tokens": [1]}, "no merged model exists"),
        ({"use_qalora": True}, "merge_and_unload"),
        ({"use_bdlora": {"nblocks": 2}}, "merge_and_unload"),
        ({"megatron_config": {"a": 1}}, "merge_and_unload"),
        ({"invented_key": 0.5}, "merge_and_unload"),
        ({"invented_key": 0}, "merge_and_unload"),
    ],
)
def test_what_is_not_a_plain_lora_is_refused_by_its_key(keys: dict[str, Any], hint: str, tmp_path: Path) -> None:
    ((key, value),) = keys.items()
    with pytest.raises(InputError, match=re.escape(f"`{key} = {json.dumps(value)}` is not supported")) as failure:
        read_lora_config(write(tmp_path, **keys))
    assert hint in str(failure.value.hint)


def test_a_file_without_a_type_is_refused(tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_text('{"r": 2}')
    with pytest.raises(InputError, match="peft_type = null"):
        read_lora_config(tmp_path / CONFIG)


@pytest.mark.parametrize(
    "text", ["[]", "{", '{"peft_type": "LORA", "r": "two"}', '{"peft_type": "LORA", "rank_pattern": 3}']
)
def test_what_peft_does_not_write_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_text(text)
    with pytest.raises(InputError, match="is not what peft writes"):
        read_lora_config(tmp_path / CONFIG)


def test_every_key_of_peft_at_its_default_is_a_plain_lora(tmp_path: Path) -> None:
    peft.LoraConfig(r=2, lora_alpha=3).save_pretrained(str(tmp_path))
    config = read_lora_config(tmp_path / CONFIG)
    assert (config.rank, config.alpha) == (2, 3)
    known = {field.name for field in fields(peft.LoraConfig)}
    assert {"r", "lora_alpha", "target_modules"} <= known
    stale = lora_config._FREE | lora_config._READ
    assert stale <= known | {"velora_config"}, "a key that peft does not have"


def test_a_key_of_a_later_peft_may_stand_there_unused(tmp_path: Path) -> None:
    later: dict[str, Any] = {"invented_key": None, "invented_flag": False, "invented_list": [], "invented_table": {}}
    assert read_lora_config(write(tmp_path, **later)).rank == 2


def test_patterns_match_the_end_of_a_name_and_the_first_one_counts(tmp_path: Path) -> None:
    config = read_lora_config(
        write(tmp_path, rank_pattern={"0.q": 8, "q": 4}, alpha_pattern={"q": 16}, use_rslora=True)
    )
    assert [config.find_rank(name) for name in ("layers.0.q", "layers.1.q", "layers.10.qq")] == [8, 4, 2]
    assert config.find_scale("layers.1.q", 4) == 8
    assert config.find_scale("k", 9) == 1


@pytest.mark.parametrize(
    ("shapes", "complaint"),
    [
        ({"a.lora_A.weight": (3, 4), "a.lora_B.weight": (5, 3)}, f"a has rank 3, its {CONFIG} says 2"),
        ({"a.lora_A.weight": (2, 4), "a.lora_B.weight": (5, 1)}, "which do not multiply"),
        ({"a.lora_A.weight": (0,), "a.lora_B.weight": (5, 2)}, "which do not multiply"),
        ({"a.lora_A.weight": (2, 4), "a.lora_B.bias": (5,)}, "a.lora_B.bias is not a part of a plain LoRA"),
    ],
)
def test_factors_that_are_not_a_pair_are_refused(
    shapes: dict[str, tuple[int, ...]], complaint: str, tmp_path: Path
) -> None:
    write(tmp_path)
    save_file({f"base_model.model.{name}": torch.ones(shape) for name, shape in shapes.items()}, tmp_path / WEIGHTS)
    with pytest.raises(InputError, match=re.escape(complaint)):
        read_adapter(tmp_path)


def test_a_pickled_adapter_is_refused_with_a_line_that_converts_it(tmp_path: Path) -> None:
    folder = tmp_path / "with a blank"
    folder.mkdir()
    write(folder)
    shared = torch.randn(4, 2)
    torch.save({"a.lora_A.weight": shared.T, "b.lora_A.weight": shared.T}, folder / "adapter_model.bin")
    with pytest.raises(InputError, match=r"adapter_model\.bin is a pickle") as failure:
        list_adapter_files(folder)
    line = str(failure.value.hint).partition(": ")[2]
    subprocess.run([sys.executable, *shlex.split(line)[1:]], check=True, capture_output=True)
    assert torch.equal(load_file(folder / WEIGHTS)["b.lora_A.weight"], shared.T)
    assert list_adapter_files(folder)[1] == folder / WEIGHTS
