"""Gives transformers models, in place, the forms that compute the same and that every exporter lowers."""

import sys
import types
from typing import Any

import torch
from torch import Tensor, nn

from rankship_pipeline.foundation.errors import InputError


def settle(model: nn.Module) -> None:
    """Give transformers models in it `eager` attention (T5's own does not lower), and heads of fixed shapes."""
    library: Any = sys.modules.get("transformers")
    for module in () if library is None else list(model.modules()):
        if not isinstance(module, library.PreTrainedModel):
            continue
        module.set_attn_implementation("eager")
        if module.config.is_encoder_decoder and hasattr(module, "classification_head"):
            vars(module)["forward"] = types.MethodType(_classify, module)  # a deep copy's is bound to the copy


def _classify(
    model: Any,  # noqa: ANN401 - transformers has no types
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    decoder_input_ids: Tensor | None = None,
    **others: Any,  # noqa: ANN401
) -> Any:  # noqa: ANN401
    """What BartForSequenceClassification and its kin compute: the head on the state of each text's last end token.

    Their own code selects end tokens by a mask, and the shape of what it selects depends on the texts.
    """
    from transformers.modeling_outputs import Seq2SeqSequenceClassifierOutput

    ends = input_ids == model.config.eos_token_id
    if not torch.compiler.is_compiling() and not bool(ends.any(1).all()):
        raise InputError(
            f"{type(model).__name__} reads the end token {model.config.eos_token_id} of each text, and some have none",
            hint="end every text of the data with it, as the model's tokenizer does",
        )
    if decoder_input_ids is None and hasattr(model, "_shift_right"):  # T5's; BART's base model does it itself
        decoder_input_ids = model._shift_right(input_ids)  # noqa: SLF001 - as T5's own forward
    found = model.base_model(
        input_ids,
        attention_mask=attention_mask,
        decoder_input_ids=decoder_input_ids,
        **others | {"return_dict": True, "use_cache": False},
    )
    states = found.last_hidden_state
    places = torch.arange(ends.shape[1], device=ends.device, dtype=torch.int32)
    last = (places * ends).argmax(1)
    logits = model.classification_head(states[torch.arange(len(states), device=ends.device), last])
    rest = {name: value for name, value in found.items() if name != "last_hidden_state"}
    return Seq2SeqSequenceClassifierOutput(logits=logits, **rest)
