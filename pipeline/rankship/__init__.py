"""Low-rank models to small devices, from Python: merge, compress, export, measure.

    import rankship as rs

    small = rs.compress(model, calibration, kept_parameters=0.4)     # any torch module, unlabelled inputs
    small.plan, small.report(), small.module                         # ranks, what each layer loses, a torch module
    one = rs.merge([a, b], calibration={"a": xa, "b": xb})           # several models become one; compress takes it
    built = rs.export(small, "out/", formats=["onnx", "tflite"])     # every file proven to compute what torch does
    measured = rs.measure(built, on="pi4")                           # raw samples, and a page that judges them
    again = rs.load("out/")                                          # safetensors and the plan; no pickle
    built = rs.run(rs.Recipe.read("mine.toml"))                      # the same stages from a recipe file
    rs.stream("folder", "out/", text="corpus.txt", kept_parameters=0.8)   # a language model larger than memory

Importing it loads nothing heavy: torch comes with the first function that needs it.
"""

import importlib
from typing import TYPE_CHECKING

from rankship_pipeline import __version__

if TYPE_CHECKING:
    from rankship.built import Built, export, run
    from rankship.compressed import Compressed, compress
    from rankship.measured import Measured, measure
    from rankship.merged import Merged, merge
    from rankship.recipe import Recipe
    from rankship.saved import load
    from rankship.streamed import stream
    from rankship_benchmarks.bundle.suite import AccuracyChoice, DelegateChoice, EnergyChoice, Suite
    from rankship_pipeline.foundation.errors import RankshipError
    from rankship_pipeline.recipe.budget import Budget
    from rankship_pipeline.recipe.choices import (
        Comparison,
        DataChoice,
        FactoriseChoice,
        MergeChoice,
        QualityChoice,
        RankChoice,
        RefineChoice,
        Source,
    )
    from rankship_pipeline.recipe.export_choices import AxisChoice, ExportChoice, ParityChoice
    from rankship_pipeline.recipe.precision import PrecisionChoice

__all__ = [
    "AccuracyChoice",
    "AxisChoice",
    "Budget",
    "Built",
    "Comparison",
    "Compressed",
    "DataChoice",
    "DelegateChoice",
    "EnergyChoice",
    "ExportChoice",
    "FactoriseChoice",
    "Measured",
    "MergeChoice",
    "Merged",
    "ParityChoice",
    "PrecisionChoice",
    "QualityChoice",
    "RankChoice",
    "RankshipError",
    "Recipe",
    "RefineChoice",
    "Source",
    "Suite",
    "__version__",
    "compress",
    "export",
    "load",
    "measure",
    "merge",
    "run",
    "stream",
]

# name → the module that holds it, imported when the name is first used
_HOMES = {
    "rankship.built": ("Built", "export", "run"),
    "rankship.compressed": ("Compressed", "compress"),
    "rankship.measured": ("Measured", "measure"),
    "rankship.merged": ("Merged", "merge"),
    "rankship.recipe": ("Recipe",),
    "rankship.saved": ("load",),
    "rankship.streamed": ("stream",),
    "rankship_benchmarks.bundle.suite": ("AccuracyChoice", "DelegateChoice", "EnergyChoice", "Suite"),
    "rankship_pipeline.foundation.errors": ("RankshipError",),
    "rankship_pipeline.recipe.export_choices": ("AxisChoice", "ExportChoice", "ParityChoice"),
    "rankship_pipeline.recipe.precision": ("PrecisionChoice",),
}
_CHOICES = "rankship_pipeline.recipe.choices"


def __getattr__(name: str) -> object:
    if name.startswith("_") or name not in __all__:
        message = f"module 'rankship' has no attribute {name!r}"
        raise AttributeError(message)
    home = next((home for home, names in _HOMES.items() if name in names), _CHOICES)
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return __all__
