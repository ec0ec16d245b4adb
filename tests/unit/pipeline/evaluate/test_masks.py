"""Which positions are padding, by the names and the values of a model's inputs."""

import pytest
import torch
from torch import Tensor, nn

from rankship_pipeline.evaluate.grams import collect_grams
from rankship_pipeline.evaluate.masks import find_mask, find_masks, pick_mask
from rankship_pipeline.models.layers import find_layers

IDS = torch.tensor([[4, 5, 6, 0], [7, 8, 0, 0]])
MASK = (IDS > 0).long()
WORDS, SHOWN = IDS[:, :3], MASK[:, :3]


class Plain(nn.Module):
    """A hand-written encoder and decoder: each side has its own table and layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.left, self.right = nn.Embedding(9, 5), nn.Linear(5, 5), nn.Linear(5, 5)

    def forward(self, ids: Tensor, mask: Tensor, words: Tensor, decoder_mask: Tensor) -> Tensor:
        whole = (self.left(self.table(ids)) * mask[..., None]).sum(1, keepdim=True)
        found: Tensor = self.right(self.table(words) + whole) * decoder_mask[..., None]
        return found


def test_an_encoders_and_a_decoders_padding_count_in_no_gram() -> None:
    model = Plain().eval()
    batch = (IDS, MASK, WORDS, SHOWN)
    assert [one.shape for one in find_masks(model, batch)] == [MASK.shape, SHOWN.shape]
    assert find_mask(model, batch) is None
    layers = tuple(one for one in find_layers(model) if one.kind == "linear")
    grams = collect_grams(model, batch, layers)
    x = model.table(IDS)[MASK.bool()].double()
    torch.testing.assert_close(grams["left"], x.T @ x / 2)
    whole = (model.left(model.table(IDS)) * MASK[..., None]).sum(1, keepdim=True)
    y = (model.table(WORDS) + whole)[SHOWN.bool()].double()
    torch.testing.assert_close(grams["right"], y.T @ y / 2)


@pytest.mark.parametrize(
    "mask",
    [torch.rand(2, 4), MASK * 3, torch.ones(2, 3), torch.ones(2, 4, 4)],
    ids=["shares", "counts", "length", "shape"],
)
def test_a_forwards_mask_is_one_only_if_it_looks_like_one(mask: Tensor) -> None:
    class Model(nn.Module):
        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
            return ids * mask

    assert find_masks(Model(), (IDS, mask)) == ()
    assert find_mask(Model(), (IDS, MASK)) is not None
    assert find_masks(Model(), (IDS.float(), MASK)) == (), "no tokens"


def test_where_both_masks_fit_no_real_position_is_lost() -> None:
    masks = (MASK.bool(), MASK.flip(1).bool())
    found = pick_mask(masks, torch.Size((2, 4, 8)))
    assert found is not None
    assert torch.equal(found, masks[0] | masks[1])
    assert pick_mask(masks, torch.Size((2, 5, 8))) is None
    assert pick_mask((), torch.Size((2, 4))) is None
