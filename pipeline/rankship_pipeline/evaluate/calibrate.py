"""Measures what compression needs from the data, batch by batch: every layer's input Gram and output curvature."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import unfold

from rankship_pipeline.models.data import Inputs
from rankship_pipeline.models.layers import Factorable, Layer, get_layer
from rankship_pipeline.models.watch import watch

Grams = dict[str, Tensor]
Collect = Callable[[nn.Module, Inputs, Sequence[Layer]], Grams]
BATCH = 64
# Occurrences added to every token of an embedding, so that tokens absent from the calibration data count too.
TOKEN_SMOOTHING = 0.1
# Up to this many classes the Fisher is summed over all of them; beyond, that many labels are drawn per output.
_DRAWS = 10


@torch.inference_mode()
def collect_grams(model: nn.Module, inputs: Inputs, layers: Sequence[Layer]) -> Grams:
    """Run all samples through the model and sum each layer's uncentred Gram, float64 (columns, columns).

    The rows of X are a linear layer's tokens or a convolution's im2col patches; padding does not count. The Gram is
    divided by the number of samples, so that models calibrated on different amounts of data weigh the same. An
    embedding's inputs are one-hot, so its Gram is the diagonal of token frequencies, (columns,). Only one batch of
    activations is in memory.
    """
    grams = {layer.name: _start_gram(layer) for layer in layers}
    modules = {layer.name: get_layer(model, layer.name) for layer in layers}
    mask: Tensor | None = None  # of the batch that is running

    def add(name: str, x: Tensor, _y: Tensor) -> None:
        gram, rows = grams[name], as_rows(modules[name], x, mask)
        if gram.ndim == 1:
            gram += torch.bincount(rows, minlength=len(gram))
        else:
            X = rows.to(torch.float64)  # (positions, columns)
            gram.addmm_(X.T, X)  # summed in float32, a singular Gram would come out indefinite

    with watch(model, modules, add):
        for batch in split(inputs):
            mask = find_mask(model, batch)
            model(*batch)
    return {name: gram / len(inputs[0]) for name, gram in grams.items()}


def collect_curvatures(model: nn.Module, inputs: Inputs, layers: Sequence[Layer], seed: int = 0) -> Grams:
    """The Fisher information of the model's own predictions at every layer's output, (rows, rows), float64.

    E_x E_{y~p(y|x)} Σ g·gᵀ / positions with g = ∂ log p(y|x) / ∂ output: it needs no labels, only the model's own
    predictions. With a Gram G from `collect_grams`, ½·tr(H·Δ·G·Δᵀ) is the Kronecker-factored estimate of the divergence
    in nats that an error Δ in the weight causes (Martens and Grosse 2015).
    """
    curvatures = {layer.name: torch.zeros(layer.rows, layer.rows, dtype=torch.float64) for layer in layers}
    outputs: dict[str, Tensor] = {}
    modules = {layer.name: get_layer(model, layer.name) for layer in layers}

    def keep(name: str, _x: Tensor, y: Tensor) -> Tensor:
        outputs[name] = y if y.requires_grad else y.requires_grad_()
        return y.clone()  # an in-place activation must not overwrite the kept output

    generator = torch.Generator().manual_seed(seed)
    positions = dict.fromkeys(curvatures, 0)
    with watch(model, modules, keep), torch.enable_grad():
        for batch in split(inputs, BATCH // 2):  # the backward pass holds every activation
            outputs.clear()
            mask = find_mask(model, batch)
            for target in draw_predictions(model(*batch), mask, generator):
                kept = list(outputs.values())
                gradients = torch.autograd.grad(target, kept, retain_graph=True, allow_unused=True)
                for name, gradient in zip(outputs, gradients, strict=True):
                    if gradient is None:
                        continue  # the prediction does not depend on this layer
                    g = as_outputs(modules[name], gradient, mask)  # (positions, rows)
                    curvatures[name] += (g.T @ g).to(torch.float64)
            for name, output in outputs.items():
                positions[name] += len(as_outputs(modules[name], output, mask))
    return {name: curvature / max(1, positions[name]) for name, curvature in curvatures.items()}


def collect_halves(collect: Collect, model: nn.Module, inputs: Inputs, layers: Sequence[Layer]) -> Grams:
    """What `collect` gives on the even and on the odd samples, stacked: (2, columns, columns) or (2, columns).

    How far the two differ says how much of either is chance (see factors/shrink.py). One sample has no halves: nothing
    is known of others, and its own matrix stands beside zeros.
    """
    if len(inputs[0]) == 1:
        return {name: torch.stack([one * 2, 0 * one]) for name, one in collect(model, inputs, layers).items()}
    even, odd = (collect(model, tuple(tensor[start::2] for tensor in inputs), layers) for start in (0, 1))
    return {name: torch.stack([even[name], odd[name]]) for name in even}


def split(inputs: Inputs, size: int = BATCH) -> list[Inputs]:
    """Split samples into the fewest batches of at most `size`, as even as possible for averages over batches."""
    count = -(-len(inputs[0]) // size)
    return list(zip(*(tensor.tensor_split(count) for tensor in inputs), strict=True))


def find_mask(model: nn.Module, batch: Inputs) -> Tensor | None:
    """The batch's attention mask (samples, positions) as booleans; None if the model has no such input."""
    names = getattr(model, "inputs", ())
    return batch[names.index("attention_mask")].bool() if "attention_mask" in names else None


def as_rows(module: Factorable, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """A layer's input as rows: tokens (·, in), a convolution's patches (·, in·kh·kw), or token ids (·,).

    With a mask (samples, positions), rows of padding are left out if the input has these positions.
    """
    if isinstance(module, nn.Embedding):
        return (x if mask is None or x.shape != mask.shape else x[mask]).reshape(-1)
    if isinstance(module, nn.Linear):
        return _select(x, mask).reshape(-1, x.shape[-1])
    if isinstance(module.padding, str):
        left_right_top_bottom = module._reversed_padding_repeated_twice  # noqa: SLF001 - as Conv2d's own forward
        x = nn.functional.pad(x, left_right_top_bottom)
        padding: int | tuple[int, ...] = 0
    else:
        padding = module.padding
    patches = unfold(x, module.kernel_size, module.dilation, padding, module.stride)  # (n, in·kh·kw, positions)
    return patches.transpose(1, 2).reshape(-1, patches.shape[1])


def as_outputs(module: Factorable, y: Tensor, mask: Tensor | None = None) -> Tensor:
    """A layer's output (or its gradient) as rows (positions, rows), in the order of `as_rows`."""
    if isinstance(module, nn.Conv2d):
        return y.flatten(2).transpose(1, 2).reshape(-1, y.shape[1])
    return _select(y, mask).reshape(-1, y.shape[-1])


def _select(x: Tensor, mask: Tensor | None) -> Tensor:
    """The rows of (samples, positions, features) that are not padding; tensors of another shape stay whole."""
    return x if mask is None or x.ndim != 3 or x.shape[:2] != mask.shape else x[mask]  # noqa: PLR2004


def _start_gram(layer: Layer) -> Tensor:
    if layer.kind == "embedding":
        return torch.full((layer.columns,), TOKEN_SMOOTHING, dtype=torch.float64)
    return torch.zeros(layer.columns, layer.columns, dtype=torch.float64)


def draw_predictions(logits: Tensor, mask: Tensor | None, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield scalars whose gradients' outer products sum to the Fisher: over all classes weighted, or drawn labels."""
    logs = logits.log_softmax(-1)  # (samples, classes) or (samples, positions, classes)
    kept = mask if mask is not None and logits.shape[:-1] == mask.shape else torch.ones(logits.shape[:-1]).bool()
    chances = logs.detach().exp()
    if logits.ndim == 2 and logits.shape[-1] <= _DRAWS:  # noqa: PLR2004 - a classifier's logits
        for index in range(logits.shape[-1]):
            yield (chances[:, index].sqrt() * logs[:, index]).sum()
        return
    for _ in range(_DRAWS):
        labels = torch.multinomial(chances.flatten(0, -2), 1, generator=generator).view(*logits.shape[:-1], 1)
        yield logs.gather(-1, labels).squeeze(-1)[kept].sum() / _DRAWS**0.5
