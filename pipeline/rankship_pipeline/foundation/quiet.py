"""Keeps what the libraries underneath print about themselves off the user's terminal; errors stay."""

import logging
import os
import warnings

VERBOSE = "RANKSHIP_VERBOSE"  # in the environment: what --verbose does, for every verb and every process that it starts
# What is said before Python's own filters are asked, or by programs that a verb starts.
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
