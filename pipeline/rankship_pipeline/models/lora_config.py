"""What the adapter_config.json of a LoRA adapter may say: an allow-list over the keys that peft writes."""

import json
import math
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from rankship_pipeline.foundation.errors import InputError

CONFIG = "adapter_config.json"
Value = TypeVar("Value", int | None, float)
# keys that say which layers were adapted or how they were trained, which the tensors themselves show
_FREE = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "peft_version",
        "task_type",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "lora_dropout",
        "modules_to_save",
        "megatron_core",
        "runtime_config",
        "qalora_group_size",
        "loftq_config",
        "eva_config",
        "corda_config",
        "lora_ga_config",
    }
)
_READ = frozenset(
    {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "fan_in_fan_out", "ensure_weight_tying"}
)
_MERGES = "merge it into its model with peft, and give that model: {line}"
_PLAIN = "save it as a plain LoRA where it was trained: save_pretrained(…, path_initial_model_for_weight_conversion=…)"
_INSEPARABLE = "no merged model exists for it: it acts on some tokens or inputs only"
# the values of keys that change numbers with which an adapter is still W + s·BA
_CHOICES: dict[str, frozenset[object]] = {
    "peft_type": frozenset({"LORA"}),
    "bias": frozenset({"none", "all", "lora_only"}),
    "init_lora_weights": frozenset({True, False, None, "gaussian", "eva", "orthogonal", "mica"}),
}
# initialisations that change the base weights, and do so alike whenever peft loads the adapter
_REPEATED = frozenset({"pissa", "olora"})
_UNMERGED = frozenset({"alora_invocation_tokens", "alora_invocation_string", "arrow_config"})
_PROMPTS = frozenset({"PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT"})
_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}


@dataclass(frozen=True)
class LoraConfig:
    """What the numbers of an adapter depend on beside its tensors; keys that are left out have peft's defaults.

    `rank` is None where the file does not say it. `is_transposed` is what peft noted of the last layer that it adapted.
    """

    rank: int | None
    alpha: float
    ranks: Mapping[str, int | None]
    alphas: Mapping[str, float]
    is_stabilised: bool
    is_transposed: bool
    is_tied: bool
    base: str | None

    def find_rank(self, module: str) -> int | None:
        """A module's rank, None where the file does not say it."""
        return _find_value(self.ranks, module, self.rank)

    def find_scale(self, module: str, rank: int) -> float:
        """α / r, or α / √r for rank-stabilised LoRA (Kalajdzievski 2023)."""
        alpha = _find_value(self.alphas, module, self.alpha)
        return float(alpha / (math.sqrt(rank) if self.is_stabilised else rank))


def _find_value(pattern: Mapping[str, Value], module: str, default: Value) -> Value:
    """The value of the first key that matches the end of a module's name, as peft reads its patterns."""
    return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", module)), default)


def read_lora_config(path: Path) -> LoraConfig:
    """Read the file; one InputError names every key that makes the adapter more than a plain LoRA."""
    try:
        given = json.loads(path.read_text(encoding="utf-8-sig"))
        _refuse_unsupported(path, given)
        return LoraConfig(
            rank=None if given.get("r") is None else int(given["r"]),
            alpha=float(given.get("lora_alpha", 8)),
            ranks={key: int(value) for key, value in (given.get("rank_pattern") or {}).items()},
            alphas={key: float(value) for key, value in (given.get("alpha_pattern") or {}).items()},
            is_stabilised=bool(given.get("use_rslora")),
            is_transposed=bool(given.get("fan_in_fan_out")),
            is_tied=bool(given.get("ensure_weight_tying")),
            base=given.get("base_model_name_or_path") or None,
        )
    except (ValueError, TypeError, AttributeError) as failure:
        raise InputError(f"{path} is not what peft writes: {failure}", hint="save the adapter again") from None


def _refuse_unsupported(path: Path, given: Mapping[str, Any]) -> None:
    odd = {key: value for key, value in given.items() if not _is_supported(key, value)}
    if "peft_type" not in given:
        odd["peft_type"] = None
    if odd:
        said = ", ".join(f"`{key} = {json.dumps(value)}`" for key, value in sorted(odd.items()))
        raise InputError(f"{path}: {said} is not supported", hint=_advise(path.parent, given, odd))


def _is_supported(key: str, value: object) -> bool:
    """Whether a key changes no number at this value; what this release does not know must be off."""
    if key in _CHOICES:
        wanted = value.lower() if key == "init_lora_weights" and isinstance(value, str) else value
        return isinstance(wanted, str | bool | None) and wanted in _CHOICES[key]
    return key in _FREE | _READ or value is None or value is False or value in ("", [], {})


def _advise(folder: Path, given: Mapping[str, Any], odd: Mapping[str, Any]) -> str:
    if odd.keys() & _UNMERGED or odd.get("peft_type") in _PROMPTS:
        return _INSEPARABLE
    start = odd.get("init_lora_weights")
    if start == "loftq":
        return "merge it where it was trained (merge_and_unload): its base is the quantised model that it began with"
    if start is not None and str(start).lower() not in _REPEATED:
        return _PLAIN
    model = _CLASSES.get(str(given.get("task_type")), "AutoModel")
    base = given.get("base_model_name_or_path") or "BASE"
    names = [json.dumps(str(one)) for one in (base, folder, f"{folder}-merged")]
    code = (
        f"from transformers import {model} as M; from peft import PeftModel as P;"
        f" P.from_pretrained(M.from_pretrained({names[0]}), {names[1]}).merge_and_unload().save_pretrained({names[2]})"
    )
    return _MERGES.format(line=f"python -c {shlex.quote(code)}")
