import copy

import pytest
import torch
import transformers
from torch import Tensor, nn

from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.models.settle import settle

T5_SIZES = {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
BART_SIZES = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
FAMILIES = {
    **dict.fromkeys(("T5", "MT5", "UMT5"), T5_SIZES),
    **dict.fromkeys(("Bart", "MBart", "PLBart", "Mvp", "BigBirdPegasus"), BART_SIZES),
}


def make_classifier(family: str) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(vocab_size=100, num_labels=3, **FAMILIES[family])
    model: nn.Module = getattr(transformers, f"{family}ForSequenceClassification")(config).eval()
    return model


def draw_texts(end: int) -> tuple[Tensor, Tensor]:
    """Four texts with two end tokens each, padded."""
    ids = torch.randint(5, 90, (4, 16), generator=torch.Generator().manual_seed(1))
    length = torch.tensor([11, 13, 15, 16])
    ids[:, 5] = end
    ids[torch.arange(4), length - 1] = end
    mask = (torch.arange(16) < length[:, None]).to(torch.int64)
    return ids * mask, mask


@pytest.mark.parametrize("family", FAMILIES)
def test_a_settled_classifier_gives_transformers_own_logits(family: str) -> None:
    model = make_classifier(family)
    ids, mask = draw_texts(model.config.eos_token_id)  # type: ignore[union-attr,arg-type]
    settled = copy.deepcopy(model)
    settle(settled)
    again = copy.deepcopy(settled)  # its forward must be its own
    with torch.no_grad():
        for parameter in settled.parameters():
            parameter.zero_()
        torch.testing.assert_close(
            again(input_ids=ids, attention_mask=mask).logits, model(input_ids=ids, attention_mask=mask).logits
        )


def test_shapes_do_not_depend_on_the_texts() -> None:
    model = make_classifier("T5")
    settle(model)
    ids, mask = draw_texts(1)
    graph = torch.export.export(model, (ids, mask), strict=False)
    targets = {str(node.target) for node in graph.graph.nodes}
    assert not any("unique" in one or "nonzero" in one for one in targets)


def test_a_text_without_its_end_token_is_refused() -> None:
    model = make_classifier("Bart")
    settle(model)
    with pytest.raises(InputError, match="end token 2 of each text"):
        model(torch.full((2, 8), 7), torch.ones(2, 8, dtype=torch.int64))
