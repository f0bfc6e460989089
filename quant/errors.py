"""Named errors. Every message says what was found, what is allowed, and what to do.

All of them derive from `FewbitError`, so that the command line can print one line and exit with
code 1 without ever catching a programming error by accident.
"""

import difflib
from collections.abc import Iterable


class FewbitError(Exception):
    """Root of every error that fewbit raises on purpose."""


class RecipeError(FewbitError):
    """A recipe, an option of it, or a command-line setting is wrong."""


class CheckpointError(FewbitError):
    """A checkpoint, ours or the source's, is missing, damaged, foreign or cannot be written."""


class FormatError(FewbitError):
    """A tensor does not fit its storage format, or its stored parts are inconsistent."""


class CalibrationError(FewbitError):
    """Calibration text, activations or the model's structure do not allow the asked pass."""


class NoKernelError(FewbitError):
    """No kernel can run a problem, or the forced one refuses it."""


class TableError(FewbitError):
    """A tuned table is damaged, foreign, or of a newer version, or a setting of it is wrong."""


class TuningError(FewbitError):
    """This machine, or its device, does not allow to measure anything."""


def nearest_name(name: str, allowed: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the closest allowed name, or an empty string."""
    close = difflib.get_close_matches(name, list(allowed), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
