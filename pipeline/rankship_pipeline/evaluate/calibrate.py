"""Measures what compression needs from the data, batch by batch: every layer's input Gram and output curvature."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import unfold

from rankship_pipeline.evaluate.likelihood import Likelihood, assume_logits, draw_predictions, measure_scales
from rankship_pipeline.evaluate.long_kernels import add_patches, is_long
from rankship_pipeline.evaluate.masks import Masks, find_masks, pick_mask
from rankship_pipeline.models.data import Inputs
from rankship_pipeline.models.layers import Convolution, Factorable, Layer, Transposed, get_layer
from rankship_pipeline.models.outputs import Outputs, call, join_batches
from rankship_pipeline.models.watch import watch

Grams = dict[str, Tensor]
Collect = Callable[[nn.Module, Inputs, Sequence[Layer]], Grams]
BATCH = 64
_BLOCK = 1024  # columns of a Gram that are multiplied at once
# Occurrences added to every token of an embedding, so that tokens absent from the calibration data count too.
TOKEN_SMOOTHING = 0.1


@torch.inference_mode()
def collect_grams(model: nn.Module, inputs: Inputs, layers: Sequence[Layer]) -> Grams:
    """Run all samples through the model and sum each layer's uncentred Gram, float64 (columns, columns).

    The rows of X are a linear layer's tokens, a convolution's im2col patches or a transposed one's positions; padding
    does not count. The Gram is divided by the number of samples, so that models calibrated on different amounts of
    data weigh the same. An embedding's inputs are one-hot, so its Gram is the diagonal of token frequencies,
    (columns,). Only one batch of activations is in memory. A head that is tied to an embedding has a Gram under its own
    name; embeddings that are tied to each other count as one.
    """
    uses = {use.name: use for layer in layers for use in layer.uses}
    kept_under = _join_embeddings(layers)
    grams = {name: _start_gram(uses[name]) for name in kept_under.values()}
    modules = {name: get_layer(model, name) for name in uses}
    masks: Masks = ()  # of the batch that is running

    def add(name: str, x: Tensor, _y: Tensor) -> None:
        gram, module = grams[kept_under[name]], modules[name]
        if isinstance(module, Convolution) and is_long(module):
            padded, padding = _pad(module, x)
            add_patches(gram, module, padded, tuple(padding))
            return
        rows = as_rows(module, x, pick_mask(masks, x.shape))
        if gram.ndim == 1:
            gram += torch.bincount(rows, minlength=len(gram))
        else:
            _add_squares(gram, rows.to(torch.float64))  # in float32, a singular Gram would come out indefinite

    with watch(model, modules, add):
        for batch in split(inputs):
            masks = find_masks(model, batch)
            model(*batch)
    for gram in grams.values():
        _mirror(gram)
    return {name: gram.div_(len(inputs[0])) for name, gram in grams.items()}


def _add_squares(gram: Tensor, rows: Tensor) -> None:
    """Add XᵀX of the rows X (positions, columns) to a Gram's upper triangle of blocks; `_mirror` fills the other."""
    for start in range(0, len(gram), _BLOCK):
        gram[start : start + _BLOCK, start:].addmm_(rows[:, start : start + _BLOCK].T, rows[:, start:])


def _mirror(gram: Tensor) -> None:
    """Fill the blocks that `_add_squares` left out; a diagonal Gram (n,) has none."""
    for start in range(_BLOCK, len(gram) if gram.ndim > 1 else 0, _BLOCK):
        gram[start:, start - _BLOCK : start] = gram[start - _BLOCK : start, start:].T


def collect_curvatures(
    model: nn.Module, inputs: Inputs, layers: Sequence[Layer], seed: int = 0, likelihood: Likelihood | None = None
) -> Grams:
    """The Fisher information of the model's own predictions at every layer's output, (rows, rows), float64.

    E_x E_{y~p(y|x)} Σ g·gᵀ / positions with g = ∂ log p(y|x) / ∂ output: it needs no labels, only the model's own
    predictions, distributed by the `likelihood` (None: every output holds logits). With a Gram G from
    `collect_grams`, ½·tr(H·Δ·G·Δᵀ) is the Kronecker-factored estimate of the divergence in nats that an error Δ in
    the weight causes (Martens and Grosse 2015). Of layers tied to each other it is that of the embeddings.
    """
    curvatures = {layer.name: torch.zeros(layer.rows, layer.rows, dtype=torch.float64) for layer in layers}
    outputs: dict[str, list[Tensor]] = {name: [] for name in curvatures}  # of every call
    kept_under = {use: name for use, name in _join_embeddings(layers).items() if name in curvatures}
    modules = {name: get_layer(model, name) for name in kept_under}

    def keep(name: str, _x: Tensor, y: Tensor) -> Tensor:
        outputs[kept_under[name]].append(y if y.requires_grad else y.requires_grad_())
        return y.clone()  # an in-place activation must not overwrite the kept output

    generator = torch.Generator().manual_seed(seed)
    positions = dict.fromkeys(curvatures, 0)
    likelihood, scales = find_scales(model, inputs, likelihood)
    with watch(model, modules, keep), torch.enable_grad():
        for batch in split(inputs, BATCH // 2):  # the backward pass holds every activation
            for some in outputs.values():
                some.clear()
            masks = find_masks(model, batch)
            for target in draw_predictions(call(model, batch), likelihood, scales, masks, generator):
                kept = [(name, y) for name, some in outputs.items() for y in some]
                if not kept:
                    continue
                gradients = torch.autograd.grad(target, [y for _, y in kept], retain_graph=True, allow_unused=True)
                for (name, _), gradient in zip(kept, gradients, strict=True):
                    if gradient is None:
                        continue  # the prediction does not depend on this layer
                    g = as_outputs(modules[name], gradient, pick_mask(masks, gradient.shape))  # (positions, rows)
                    curvatures[name] += (g.T @ g).to(torch.float64)
            for name, some in outputs.items():
                positions[name] += sum(len(as_outputs(modules[name], y, pick_mask(masks, y.shape))) for y in some)
    return {name: curvature / max(1, positions[name]) for name, curvature in curvatures.items()}


def find_scales(model: nn.Module, inputs: Inputs, likelihood: Likelihood | None) -> tuple[Likelihood, Outputs]:
    """The likelihood, if None logits by assumption, and the standard deviations of the columns of other outputs."""
    if likelihood is None:
        likelihood = assume_logits(predict(model, tuple(tensor[:1] for tensor in inputs)))
    if all(answer.is_choice for answer in likelihood.values()):
        return likelihood, {}
    return likelihood, measure_scales(predict(model, inputs), likelihood)


@torch.inference_mode()
def predict(model: nn.Module, inputs: Inputs) -> Outputs:
    """The model's outputs by name, samples first, computed batch by batch."""
    return join_batches([call(model, batch) for batch in split(inputs)])


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


def as_rows(module: Factorable, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """A layer's input as rows: tokens (·, in), a convolution's patches (·, in·kh·kw), or token ids (·,).

    With a mask (samples, positions), rows of padding are left out if the input has these positions.
    """
    if isinstance(module, nn.Embedding):
        return (x if mask is None or x.shape != mask.shape else x[mask]).reshape(-1)
    if isinstance(module, Convolution):
        return _as_rows_of_patches(module, *_pad(module, x))
    if isinstance(module, Transposed):
        return x.flatten(2).transpose(1, 2).reshape(-1, x.shape[1])
    return _select(x, mask).reshape(-1, x.shape[-1])


def as_outputs(module: Factorable, y: Tensor, mask: Tensor | None = None) -> Tensor:
    """A layer's output (or its gradient) as rows (positions, rows), in the order of `as_rows`.

    Of a transposed convolution it is what each input position adds to: patches of the output (·, out·kh·kw).
    """
    if isinstance(module, Convolution):
        return y.flatten(2).transpose(1, 2).reshape(-1, y.shape[1])
    if isinstance(module, Transposed):
        return _as_rows_of_patches(module, y, [int(one) for one in module.padding])
    return _select(y, mask).reshape(-1, y.shape[-1])


def _pad(module: Convolution, x: Tensor) -> tuple[Tensor, Sequence[int]]:
    """The input, padded as `unfold` cannot ("same", or not by zeros), and the padding that is left to it."""
    if not isinstance(module.padding, str) and module.padding_mode == "zeros":
        return x, module.padding
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    padded = nn.functional.pad(x, module._reversed_padding_repeated_twice, mode)  # noqa: SLF001 - as its own forward
    return padded, [0] * len(module.kernel_size)


def _as_rows_of_patches(module: Convolution | Transposed, x: Tensor, padding: Sequence[int]) -> Tensor:
    """The patches (n·positions, in·kh·kw) of the positions on which a kernel runs over x."""
    settings = module.kernel_size, module.dilation, padding, module.stride
    if len(module.kernel_size) == 1:  # a height of one
        x = x.unsqueeze(-2)
        settings = tuple((neutral, *values) for neutral, values in zip((1, 1, 0, 1), settings, strict=True))  # type: ignore[assignment]  # pairs
    patches = unfold(x, *settings)  # type: ignore[arg-type]  # (n, in·kh·kw, positions)
    return patches.transpose(1, 2).reshape(-1, patches.shape[1])


def _select(x: Tensor, mask: Tensor | None) -> Tensor:
    """The rows of (samples, positions, features) that are not padding; tensors of another shape stay whole."""
    return x if mask is None or x.ndim != 3 or x.shape[:2] != mask.shape else x[mask]  # noqa: PLR2004


def _join_embeddings(layers: Sequence[Layer]) -> dict[str, str]:
    """The name under which a module's matrix is kept, by the name of every module that computes with a weight."""
    return {use.name: layer.name if use.kind == "embedding" else use.name for layer in layers for use in layer.uses}


def _start_gram(layer: Layer) -> Tensor:
    if layer.kind == "embedding":
        return torch.full((layer.columns,), TOKEN_SMOOTHING, dtype=torch.float64)
    return torch.zeros(layer.columns, layer.columns, dtype=torch.float64)
