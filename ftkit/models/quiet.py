"""Keeping transformers' own log lines and bars out of the terminal: what a user must know, ftkit says itself."""

import logging as python_logging
import os

from transformers.utils import logging


def quiet_transformers() -> None:
    """Show transformers' errors only, unless the user asks for more with TRANSFORMERS_VERBOSITY."""
    if "TRANSFORMERS_VERBOSITY" not in os.environ:
        logging.set_verbosity_error()
    logging.disable_progress_bar()
    # It misses an optional kernel on CPUs with AVX512-BF16, and says so as if something had failed.
    python_logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(python_logging.ERROR)
