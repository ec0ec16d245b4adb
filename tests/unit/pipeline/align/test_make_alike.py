"""A changed model computes what the original does on its own inputs; one that cannot is refused with the reason."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from rankship_pipeline.align.make_alike import Mend, mend_model
from rankship_pipeline.foundation.errors import MergeMismatch
from rankship_pipeline.recipe.normalisation import Normalisation

OWN = Normalisation(mean=(0.48, 0.46, 0.41), std=(0.23, 0.22, 0.26))
LOADERS = Normalisation(mean=(0.5,), std=(0.5,))
SCALED = Normalisation(mean=(0.0,), std=(0.5,))
RAW = Normalisation(mean=(0.0,), std=(1.0,))


def normalise(pixels: Tensor, by: Normalisation) -> Tensor:
    mean, std = (torch.tensor(one).expand(pixels.shape[1]).reshape(1, -1, 1, 1) for one in (by.mean, by.std))
    return (pixels - mean) / std


def make_norm() -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(5)
    nn.init.uniform_(norm.running_mean)  # type: ignore[arg-type]
    nn.init.uniform_(norm.running_var, 0.5, 2)  # type: ignore[arg-type]
    return norm


def end(features: int) -> list[nn.Module]:
    return [nn.ReLU(), nn.Flatten(), nn.Linear(features, 4)]


FITTING: dict[str, tuple[Callable[[], nn.Module], Normalisation, Normalisation]] = {
    "convolution with a bias": (lambda: nn.Sequential(nn.Conv2d(3, 5, 3), *end(180)), OWN, LOADERS),
    "patches": (lambda: nn.Sequential(nn.Conv2d(3, 5, 4, 4), *end(20)), LOADERS, OWN),
    "batch-norm takes the mean": (
        lambda: nn.Sequential(nn.Conv2d(3, 5, 3, bias=False), make_norm(), *end(180)),
        OWN,
        RAW,
    ),
    "padded, another scale only": (
        lambda: nn.Sequential(nn.Conv2d(3, 5, 3, padding=1, bias=False), *end(320)),
        SCALED,
        RAW,
    ),
    "flattened images": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 6), *end(6)), OWN, LOADERS),
}


@pytest.mark.parametrize("kind", FITTING)
def test_a_folded_model_gives_what_the_original_gives_on_its_own_inputs(kind: str) -> None:
    torch.manual_seed(0)
    make, trained, given = FITTING[kind]
    model, pixels = make().double().eval(), torch.rand(6, 3, 8, 8).double()
    with torch.inference_mode():
        expected = model(normalise(pixels, trained))
        unmended = model(normalise(pixels, given))
    mend_model(model, Mend(trained=trained, given=given), (normalise(pixels, given),), name="a")
    with torch.inference_mode():
        folded = model(normalise(pixels, given))
    assert (folded - expected).abs().max() <= 1e-6 * expected.abs().max()
    assert (unmended - expected).abs().max() > 0.01 * expected.abs().max(), "the two normalisations do differ"


def test_a_model_of_single_precision_keeps_its_type() -> None:
    torch.manual_seed(0)
    model, pixels = nn.Sequential(nn.Conv2d(3, 5, 3), *end(180)).eval(), torch.rand(6, 3, 8, 8)
    expected = model(normalise(pixels, OWN))
    mend_model(model, Mend(trained=OWN, given=LOADERS), (normalise(pixels, LOADERS),), name="a")
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}
    torch.testing.assert_close(model(normalise(pixels, LOADERS)), expected, atol=1e-5, rtol=1e-4)


def test_a_transformer_of_images_is_folded() -> None:
    import transformers

    from rankship_pipeline.models.huggingface import ByPosition

    torch.manual_seed(0)
    config = transformers.ViTConfig(  # type: ignore[call-arg]
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
        image_size=8,
        patch_size=4,
        num_labels=3,
    )
    model = ByPosition(transformers.ViTForImageClassification(config), ("pixel_values",)).double().eval()
    pixels = torch.rand(2, 3, 8, 8).double()
    with torch.inference_mode():
        expected = model(normalise(pixels, OWN))
        mend_model(model, Mend(trained=OWN, given=RAW), (pixels,), name="a")
        assert (model(pixels) - expected).abs().max() <= 1e-6 * expected.abs().max()


class Twice(nn.Module):
    """Reads its input in two places, one of them no layer."""

    def __init__(self, *, as_layers: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 5, 8), nn.Conv2d(3, 5, 8)
        self.as_layers = as_layers

    def forward(self, x: Tensor) -> Tensor:
        beside = self.second(x) if self.as_layers else x.mean()
        output: Tensor = self.first(x) + beside
        return output.flatten(1)


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "padding": (lambda: nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), *end(320)), "0 pads with zeros after"),
    "no bias": (lambda: nn.Sequential(nn.Conv2d(3, 5, 3, bias=False), *end(180)), "has no bias, and no batch-norm"),
    "groups": (lambda: nn.Sequential(nn.Conv2d(3, 3, 3, groups=3), *end(108)), "0 is grouped"),
    "two layers": (lambda: Twice(as_layers=True), "2 linear or convolutional layers take the input"),
    "beside the layer": (lambda: Twice(as_layers=False), "the change moves its outputs by"),
    "no layer": (
        lambda: nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(192, 4)),
        "0 linear or convolutional",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_folded_exactly_is_refused_with_the_reason(kind: str) -> None:
    torch.manual_seed(0)
    make, reason = REFUSED[kind]
    model = make().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(MergeMismatch, match=f"model 'a'.*{reason}") as caught:
        mend_model(model, Mend(trained=OWN, given=LOADERS), (torch.rand(3, 3, 8, 8),), name="a")
    assert "normalise" in caught.value.hint
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items()), "left as it was"


@pytest.mark.parametrize("inputs", [torch.rand(2, 4, 8, 8), torch.ones(2, 3, dtype=torch.int64), torch.rand(2)])
def test_a_normalisation_of_other_channels_is_refused(inputs: Tensor) -> None:
    with pytest.raises(MergeMismatch, match="a normalisation of 3 channels does not fit inputs"):
        mend_model(nn.Conv2d(4, 2, 3), Mend(trained=OWN, given=LOADERS), (inputs,), name="a")


def test_a_heads_rows_come_in_the_first_models_order() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 3)).eval(), torch.rand(5, 3)
    expected = model(x)[:, [2, 0, 1]]
    mend_model(model, Mend(label_order=(2, 0, 1)), (x,), name="b")
    torch.testing.assert_close(model(x), expected)


def test_both_mends_at_once() -> None:
    torch.manual_seed(0)
    model, pixels = nn.Sequential(nn.Conv2d(3, 5, 3), *end(180)).double().eval(), torch.rand(3, 3, 8, 8).double()
    expected = model(normalise(pixels, OWN))[:, [3, 1, 0, 2]]
    mend_model(model, Mend(label_order=(3, 1, 0, 2), trained=OWN, given=RAW), (pixels,), name="b")
    assert (model(pixels) - expected).abs().max() <= 1e-6 * expected.abs().max()


@pytest.mark.parametrize(
    "model", [nn.Sequential(nn.Linear(3, 3), nn.Softmax(-1)), nn.Sequential(nn.Linear(3, 4)), nn.Identity()]
)
def test_a_model_whose_head_is_not_its_last_word_is_refused(model: nn.Module) -> None:
    with pytest.raises(MergeMismatch, match="model 'b': its 3 classes are in another order, and no linear layer"):
        mend_model(model.eval(), Mend(label_order=(2, 0, 1)), (torch.rand(5, 3),), name="b")


def test_a_model_that_needs_no_mending_is_not_touched() -> None:
    model = nn.Identity()
    assert mend_model(model, Mend(), (), name="a") is model
