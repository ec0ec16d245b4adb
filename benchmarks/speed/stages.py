"""Calibration against a plain forward pass, and compression against numpy's SVD, on the shapes of nets.py."""

import numpy as np
import torch

from rankship_pipeline.evaluate.calibrate import predict
from rankship_pipeline.models.layers import as_matrix, get_layer
from speed.nets import SHAPES, make_inputs, make_net
from speed.ours import calibrate, decompose_and_plan, list_layers
from speed.records import Measured
from speed.timing import list_peak, list_times, measure_peak, spend_in_turn

KEPT = 0.5


def measure_calibration(rounds: int, *, shape: str, samples: int) -> Measured:
    """Time Grams and curvature of every layer, in halves, beside one forward pass over the same samples.

    `peak_above_model_bytes` is what calibrating adds to the model and its inputs, in a process that did nothing before.
    """
    model, inputs = make_net(SHAPES[shape]), make_inputs(SHAPES[shape], samples)
    layers = list_layers(model)
    predict(model, tuple(tensor[:1] for tensor in inputs))  # what torch sets up once counts for neither
    peak = measure_peak(lambda: calibrate(model, inputs, layers))
    jobs = {"ours": lambda: calibrate(model, inputs, layers), "forward": lambda: predict(model, inputs)}
    times = list_times(spend_in_turn(jobs, rounds), "ours")
    return Measured(
        figures=(*times, list_peak("peak_above_model", peak)),
        parameters={"shape": shape, "samples": str(samples), "layers": str(len(layers))},
    )


def measure_compression(rounds: int, *, shape: str, samples: int) -> Measured:
    """Time the default method from statistics to a plan beside numpy's SVD of every layer's matrix in float64."""
    model, inputs = make_net(SHAPES[shape]), make_inputs(SHAPES[shape], samples)
    layers = list_layers(model)
    statistics = calibrate(model, inputs, layers)
    matrices = [as_matrix(get_layer(model, layer.name)).double().numpy() for layer in layers]

    def decompose_all() -> None:
        for matrix in matrices:
            np.linalg.svd(matrix, full_matrices=False)

    peak = measure_peak(lambda: decompose_and_plan(model, inputs, statistics, KEPT))
    jobs = {"ours": lambda: decompose_and_plan(model, inputs, statistics, KEPT), "numpy_svd": decompose_all}
    with torch.inference_mode():
        times = list_times(spend_in_turn(jobs, rounds), "ours")
    return Measured(
        figures=(*times, list_peak("peak_above_statistics", peak)),
        parameters={"shape": shape, "samples": str(samples), "kept_parameters": str(KEPT)},
    )
