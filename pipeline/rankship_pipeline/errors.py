"""The errors by their path in release 0.1, for code that catches them; their place is foundation/errors.py."""

from rankship_pipeline.foundation.errors import (
    BudgetInfeasible,
    BuildError,
    InputError,
    MeasurementError,
    MergeMismatch,
    ParityFailed,
    QualityLost,
    RankshipError,
    TargetError,
    UnsupportedOp,
)

__all__ = [
    "BudgetInfeasible",
    "BuildError",
    "InputError",
    "MeasurementError",
    "MergeMismatch",
    "ParityFailed",
    "QualityLost",
    "RankshipError",
    "TargetError",
    "UnsupportedOp",
]
