"""Other methods beside ours, on the same model to the same size in one run: seconds, memory, quality.

Each runs in a fresh process, so that memory that one leaves behind hides nothing of the next. A package that is not
installed is left out by name; none of them is a dependency of Rankship.
"""

import copy
import math
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from decimal import Decimal
from importlib.util import find_spec
from multiprocessing import get_context

import torch
from torch import Tensor, nn

from rankship_pipeline.models.layers import count_parameters
from rankship_pipeline.recipe.choices import RankChoice
from speed.ours import compress
from speed.records import Figure, Measured, make_figure
from speed.scenes import SCENES, Scene
from speed.timing import CPU_EFFECT, measure_peak, spend

_AIMET_CANDIDATES = 10
_SPLIT = 1e-3  # of the pruning ratio that is searched
_RIDGE = 1e-6  # of the mean diagonal of a Gram, as SVD-LLM's users add it


@dataclass(frozen=True)
class Peer:
    """A method: the package that it needs, if any, and its function from a scene and a share to a smaller model."""

    package: str | None
    compress: Callable[[Scene, float], nn.Module]


@dataclass(frozen=True)
class Outcome:
    """What one method took and gave."""

    cpu_s: float
    wall_s: float
    peak_bytes: int
    kept: float
    quality: float


def compress_ours(scene: Scene, kept: float) -> nn.Module:
    """Compress by Rankship's default method."""
    return compress(scene.model, scene.inputs, kept, RankChoice(exclude=scene.exclude))


def compress_svd_llm(scene: Scene, kept: float) -> nn.Module:
    """Compress every linear layer to one share by SVD-LLM (Wang et al. 2024): an SVD of W·L, G = L·Lᵀ."""
    model = copy.deepcopy(scene.model)
    layers = {name: one for name, one in model.named_modules() if isinstance(one, nn.Linear)}
    layers = {name: one for name, one in layers.items() if "lm_head" not in name}
    grams = {name: torch.zeros(one.in_features, one.in_features, dtype=torch.float64) for name, one in layers.items()}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def add(_module: nn.Module, given: tuple[Tensor, ...]) -> None:
            rows = given[0].detach().flatten(0, -2).double()
            grams[name].addmm_(rows.T, rows)

        return add

    hooks = [one.register_forward_pre_hook(watch(name)) for name, one in layers.items()]
    with torch.inference_mode():
        for sample in torch.split(scene.inputs[0], 8):
            model(sample)
    for hook in hooks:
        hook.remove()
    dense = count_parameters(model)
    inside = sum(one.weight.numel() for one in layers.values())
    share = 1 - (1 - kept) * dense / inside
    for name, one in layers.items():
        gram, (rows, columns) = grams[name], one.weight.shape
        gram += _RIDGE * gram.diagonal().mean() * torch.eye(columns, dtype=gram.dtype)
        L = torch.linalg.cholesky(gram)
        U, sigma, Vh = torch.linalg.svd(one.weight.detach().double() @ L, full_matrices=False)
        rank = max(1, int(share * rows * columns / (rows + columns)))
        right = torch.linalg.solve_triangular(L, Vh[:rank], upper=False, left=False)
        model.set_submodule(name, _pair(U[:, :rank] * sigma[:rank], right, one.bias))
    return model


def compress_aimet(scene: Scene, kept: float) -> nn.Module:
    """Compress by AIMET's spatial SVD, its ranks chosen greedily by agreement with the dense model's answers."""
    from aimet_torch.common.defs import CompressionScheme, CostMetric, GreedySelectionParameters
    from aimet_torch.compress import ModelCompressor
    from aimet_torch.defs import SpatialSvdParameters

    images = scene.inputs[0]
    with torch.inference_mode():
        wanted = scene.model(images).argmax(-1)

    def agree(model: nn.Module, _iterations: object, use_cuda: bool = False) -> float:  # noqa: ARG001, FBT001, FBT002 - AIMET's
        with torch.inference_mode():
            return float((model(images).argmax(-1) == wanted).float().mean())

    greedy = GreedySelectionParameters(Decimal(str(kept)), num_comp_ratio_candidates=_AIMET_CANDIDATES)
    auto = SpatialSvdParameters.AutoModeParams(greedy, modules_to_ignore=[])
    parameters = SpatialSvdParameters(SpatialSvdParameters.Mode.auto, params=auto)
    smaller, _ = ModelCompressor.compress_model(
        scene.model,
        agree,
        None,
        tuple(images[:1].shape),
        CompressionScheme.spatial_svd,
        CostMetric.memory,
        parameters,
    )
    return smaller  # type: ignore[no-any-return]  # AIMET has no types


def compress_tensorly(scene: Scene, kept: float) -> nn.Module:
    """Compress every layer to one share by TensorLy-Torch: Tucker of convolutions, tensor trains of linear ones."""
    from tltorch import FactorizedConv, FactorizedLinear

    model = copy.deepcopy(scene.model)
    for name, one in [*model.named_modules()]:
        if isinstance(one, nn.Conv2d) and one.in_channels > 3:  # noqa: PLR2004 - colours
            smaller = FactorizedConv.from_conv(one, rank=kept, factorization="tucker", implementation="factorized")
        elif isinstance(one, nn.Linear) and one.out_features > one.in_features // 100:
            smaller = FactorizedLinear.from_linear(one, rank=kept, factorization="blocktt", implementation="factorized")
        else:
            continue
        model.set_submodule(name, smaller)
    return model


def compress_pruning(scene: Scene, kept: float) -> nn.Module:
    """Remove channels by Torch-Pruning's groups of smallest norm; the largest model that is small enough."""
    import torch_pruning

    outputs = [one for one in scene.model.modules() if isinstance(one, nn.Linear)][-1:]
    dense = count_parameters(scene.model)

    def prune(ratio: float) -> nn.Module:
        model, ignored = copy.deepcopy((scene.model, outputs))
        example = scene.inputs[0][:1]
        importance = torch_pruning.importance.GroupMagnitudeImportance(p=2)
        pruner = torch_pruning.pruner.BasePruner(
            model, example, importance=importance, pruning_ratio=ratio, ignored_layers=ignored, round_to=1
        )
        pruner.step()
        return model

    low, high = 0.0, 1 - kept / 4
    while high - low > _SPLIT:
        middle = (low + high) / 2
        if count_parameters(prune(middle)) > kept * dense:
            low = middle
        else:
            high = middle
    return prune(high)


PEERS: dict[str, Peer] = {
    "ours": Peer(None, compress_ours),
    "svd_llm": Peer(None, compress_svd_llm),
    "aimet": Peer("aimet_torch", compress_aimet),
    "tensorly": Peer("tltorch", compress_tensorly),
    "torch_pruning": Peer("torch_pruning", compress_pruning),
}


def run_peer(name: str, scene_name: str, kept: float) -> Outcome:
    """Open the scene and compress it by one method; for a process of its own, whose folder it leaves.

    A peer may write beside itself: AIMET keeps its scores in ./data.
    """
    scene = SCENES[scene_name]()
    os.chdir(tempfile.gettempdir())
    made: list[nn.Module] = []
    spent = []

    def job() -> None:
        made.append(PEERS[name].compress(scene, kept))

    peak = measure_peak(lambda: spent.append(spend(job)))
    smaller = made[0].eval()
    return Outcome(
        cpu_s=spent[0].cpu_s,
        wall_s=spent[0].wall_s,
        peak_bytes=peak,
        kept=count_parameters(smaller) / count_parameters(scene.model),
        quality=scene.rate(smaller),
    )


def measure_peers(rounds: int, *, scene: str, kept: float, peers: str) -> Measured:
    """Run every method in turn, each round in fresh processes; `peers` are their names, separated by commas."""
    SCENES[scene]()  # raises here what is missing, before any process is started
    outcomes: dict[str, list[Outcome]] = {}
    left_out: dict[str, str] = {}
    for _ in range(rounds):
        for name in peers.split(","):
            package = PEERS[name].package
            if package and find_spec(package) is None:
                left_out[name] = f"{package} is not installed"
            if name in left_out:
                continue
            try:
                outcomes.setdefault(name, []).append(_run_apart(name, scene, kept))
            except Exception as failure:  # a peer's failure is its row's, not ours
                if name == "ours":
                    raise
                left_out[name] = f"{type(failure).__name__}: {str(failure)[:120]}"
                outcomes.pop(name, None)
    unit = SCENES[scene]().unit
    figures = [figure for name, found in outcomes.items() for figure in _list_figures(name, found, unit)]
    return Measured(figures=tuple(figures), parameters={"scene": scene, "kept": str(kept)}, left_out=left_out)


def _run_apart(name: str, scene: str, kept: float) -> Outcome:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(run_peer, name, scene, kept).result()


def _list_figures(name: str, found: list[Outcome], unit: str) -> list[Figure]:
    effect = CPU_EFFECT if name == "ours" else None
    return [
        make_figure(f"{name}_cpu_s", "s", [one.cpu_s for one in found], effect),
        make_figure(f"{name}_wall_s", "s", [one.wall_s for one in found]),
        make_figure(f"{name}_bytes", "bytes", [one.peak_bytes for one in found]),
        make_figure(f"{name}_kept", "share of parameters", [one.kept for one in found]),
        make_figure(f"{name}_quality", unit, [one.quality for one in found]),
    ]


def _pair(A: Tensor, B: Tensor, bias: Tensor | None) -> nn.Sequential:
    first = nn.Linear(B.shape[1], B.shape[0], bias=False)
    second = nn.Linear(A.shape[1], A.shape[0], bias=bias is not None)
    scale = math.sqrt(float(A.norm() / B.norm()))
    with torch.no_grad():
        first.weight.copy_(B * scale)
        second.weight.copy_(A / scale)
        if bias is not None:
            second.bias.copy_(bias)
    return nn.Sequential(first, second)
