"""Checks before long work that the model holds the ranges of [export]: it runs at their ends, and can be traced so."""

import torch

from rankship_pipeline.export.artifact import Part
from rankship_pipeline.export.shapes import count_rows, find_example, fit_samples
from rankship_pipeline.flow.artifacts import list_parts, trace_part
from rankship_pipeline.flow.prepared import Prepared
from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.foundation.formats import FACTS


def check_ranges(prepared: Prepared) -> None:
    """Check every axis that may vary; InputError or UnsupportedOp names the first that the model cannot hold."""
    choice = prepared.recipe.export
    if choice.batch is None and not choice.axes:
        return
    for part in list_parts(prepared, "dense", prepared.model, None):
        _check_ends(part)
        if any(FACTS[name].takes_ranges for name in choice.formats):
            trace_part(part)


def _check_ends(part: Part) -> None:
    for one in part.dimensions:
        for length in (one.low, one.high):
            point = {**find_example(part.dimensions), one.name: length}
            samples = fit_samples(part.samples, part.axes, point, count_rows(part.axes, point))
            try:
                with torch.inference_mode():
                    part.module(*samples)
            except Exception as failure:  # the model's code raises errors of any type
                raise InputError(
                    f"[export] lets {one.name} vary from {one.low} to {one.high}, and the model does not run with"
                    f" {one.name} {length}: {type(failure).__name__}: {failure}",
                    hint="narrow the range to what the model was made for, or leave it out",
                ) from failure
