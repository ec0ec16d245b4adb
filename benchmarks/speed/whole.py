"""The whole way from a model to proven files, on the shapes of nets.py; and a language model's to its perplexity."""

import tempfile
from pathlib import Path

import rankship
from rankship_pipeline.models.layers import count_parameters, find_layers
from rankship_pipeline.recipe.choices import FactoriseChoice, RankChoice
from speed.nets import SHAPES, make_inputs, make_net
from speed.records import Figure, Measured, make_figure
from speed.scenes import open_smollm2
from speed.timing import CPU_EFFECT, Spent, list_peak, measure_peak, spend

KEPT = 0.5
QUALITY_EFFECT = 0.02


def measure_whole(rounds: int, *, shape: str, samples: int) -> Measured:
    """Compress and export to ONNX with the proof, without anything in the store."""
    model, inputs = make_net(SHAPES[shape]), make_inputs(SHAPES[shape], samples)
    spent: list[Spent] = []

    def build() -> None:
        with tempfile.TemporaryDirectory() as folder:
            store = Path(folder, "store")
            small = rankship.compress(model, inputs[0], kept_parameters=KEPT, store=store, progress=False)
            rankship.export(small, Path(folder, "out"), formats="onnx", progress=False)

    peak = measure_peak(lambda: spent.append(spend(build)))  # later rounds find memory that this one leaves behind
    spent += [spend(build) for _ in range(rounds - 1)]
    return Measured(
        figures=(*_list_spent(spent), list_peak("peak_above_model", peak)),
        parameters={"shape": shape, "samples": str(samples), "kept_parameters": str(KEPT), "format": "onnx"},
    )


def measure_language_model(rounds: int, *, samples: int, kept: float) -> Measured:
    """Compress SmolLM2-135M to a share of its linear layers, by second-order damage, and measure its perplexity."""
    scene = open_smollm2(samples)
    layers = find_layers(scene.model, scene.exclude)
    share = 1 - (1 - kept) * sum(layer.parameters for layer in layers) / count_parameters(scene.model)
    choice = RankChoice(sensitivity="gradient", exclude=scene.exclude)
    made: list[rankship.Compressed] = []
    spent: list[Spent] = []

    def compress() -> None:
        with tempfile.TemporaryDirectory() as folder:
            made[:] = [
                rankship.compress(
                    scene.model,
                    scene.inputs[0],
                    kept_parameters=share,
                    ranks=choice,
                    factorise=FactoriseChoice(),
                    store=folder,
                    progress=False,
                )
            ]

    peak = measure_peak(lambda: spent.append(spend(compress)))
    spent += [spend(compress) for _ in range(rounds - 1)]
    dense, ours = scene.rate(scene.model), scene.rate(made[0].module)
    return Measured(
        figures=(
            *_list_spent(spent),
            list_peak("peak_above_model", peak),
            make_figure("dense_quality", scene.unit, [dense]),
            make_figure("ours_quality", scene.unit, [ours]),
            make_figure("quality_over_dense", "×", [ours / dense], QUALITY_EFFECT),
        ),
        parameters={"model": "SmolLM2-135M", "tokens": str(scene.inputs[0].numel()), "kept_of_layers": str(kept)},
    )


def _list_spent(spent: list[Spent]) -> list[Figure]:
    return [
        make_figure("ours_cpu_s", "s", [one.cpu_s for one in spent], CPU_EFFECT),
        make_figure("ours_wall_s", "s", [one.wall_s for one in spent]),
    ]
