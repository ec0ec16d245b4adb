"""Hides the warnings and log lines of the libraries underneath; errors stay visible."""

import logging
import os
import warnings

VERBOSE = "RANKSHIP_VERBOSE"  # environment variable: as --verbose, for a verb and the processes that it starts
# For output that Python's warning filters and logging cannot hide: from C++, or from programs that a verb starts.
_ENVIRONMENT = {
    "TORCHAO_FORCE_SKIP_LOADING_SO_FILES": "1",  # "Failed to load torchao/_C…": kernels that this processor lacks
    "TF_CPP_MIN_LOG_LEVEL": "2",
    "GLOG_minloglevel": "2",
    "TRANSFORMERS_VERBOSITY": "error",
    "PYTHONWARNINGS": "ignore",
}


def silence() -> None:
    """Hide warnings, and log records below errors, of this process and of those that it starts."""
    if os.environ.get(VERBOSE):
        return
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
