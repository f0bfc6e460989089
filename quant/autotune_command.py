"""`fewbit autotune`: what to tune, for which GPU, and into which table.

    PATH             products of a checkpoint, in its formats
    --shapes NAME    products of a packaged list, in the formats of recipes

    --dry-run        for the GPU that --gpu describes, or the one at hand; a table only with -o
    otherwise        on the GPU at hand, in a worker process; the table is the user's unless -o says so

This process never touches the GPU: the worker tells its facts. Everything that can be wrong with a
request is found before anything is compiled or written.

Attention is compiled and ranked in a dry run; it cannot be timed yet and is left to estimates.
Deliberately not here: the tuning (`autotune.py`). Timing is not yet run on a GPU.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from .autotune import METHOD, Settings, autotune
from .autotune_report import Progress, Report
from .dispatch import kernels
from .errors import RecipeError, TableError, TuningError
from .kernel import AnyProblem, Device
from .machine import load_device
from .model_shapes import (
    DEFAULT_FORMATS,
    ModelShapes,
    attention_problems,
    checkpoint_problems,
    layers_of,
    linear_problems,
    load_shapes,
)
from .recipe import load_recipe
from .timing import Candidate
from .tuned import current_tables
from .tuned_file import user_table
from .tuned_table import fingerprint
from .tuning_worker import IsolatedTimer

_CALLS = 64  # of a sample, about: a rotation over weights, 20 calls at least
_MOST_JOBS = 16
_FAR_SECONDS = 1.0  # of one call that nothing is known of


@dataclass(frozen=True)
class Request:
    """The command's flags. formats: names of recipes, separated by commas. budget_minutes: on the
    device. n_jobs: compiler processes."""

    path: str | None = None
    shapes: str | None = None
    gpu: str | None = None
    dry_run: bool = False
    budget_minutes: float | None = None
    out: str | None = None
    formats: str | None = None
    n_jobs: int | None = None


def autotune_command(request: Request, progress: Progress) -> Report:
    """Do what was asked. RecipeError for a wrong flag, CheckpointError for a PATH that is none of
    ours, TableError for a table that cannot be gone on with, TuningError without a GPU."""
    _check(request)
    shapes = load_shapes(request.shapes) if request.shapes else None
    if request.dry_run:
        device = _described(request.gpu)
        families = _families(request, shapes, device)
        settings = replace(_settings(request), out=Path(request.out) if request.out else None)
        return autotune(families, None, settings, progress=progress)
    timer = IsolatedTimer(predicted=predicted_seconds)
    try:
        facts = timer.facts()
        device = replace(facts.device, present=False)  # judged by its facts, as a described one
        conditions = sorted(facts.conditions.items())
        settings = replace(
            _settings(request),
            out=Path(request.out) if request.out else _user_table(device),
            driver=facts.driver,
            method=tuple(sorted({**dict(METHOD), **dict(conditions)}.items())),
        )
        families = _families(request, shapes, device)
        return autotune(families, timer, settings, tables=current_tables(), progress=progress)
    finally:
        timer.close()


def predicted_seconds(problem: AnyProblem, candidate: Candidate) -> float:
    """Of one sample, by the model; 0 if it knows nothing."""
    kernel = kernels()[candidate.kernel]
    config = (candidate.config,) if kernel.configs else ()
    seconds = kernel.seconds(problem, *config)
    return _CALLS * seconds if seconds < _FAR_SECONDS else 0.0


def _check(request: Request) -> None:
    """RecipeError or TuningError for flags that do not go together."""
    if (request.path is None) == (request.shapes is None):
        raise RecipeError(
            "give a checkpoint folder or --shapes NAME, and not both; `--shapes llama3-8b`, say"
        )
    budget = request.budget_minutes
    if budget is not None and not 0 < budget < math.inf:
        raise RecipeError(f"--budget must be minutes above 0, got {budget:g}")
    if request.n_jobs is not None and request.n_jobs < 1:
        raise RecipeError(f"--jobs must be at least 1, got {request.n_jobs}")
    if request.formats is not None and request.shapes is None:
        raise RecipeError("--formats goes with --shapes; a checkpoint has its own formats")
    if request.gpu is not None and not request.dry_run:
        raise RecipeError(f"--gpu {request.gpu} needs --dry-run: only the GPU at hand can be timed")
    if request.out is not None:
        _check_folder(Path(request.out))
    if not request.dry_run and not torch.cuda.is_available():
        raise TuningError(
            "timing needs a CUDA GPU and torch sees none; `--dry-run --gpu h200` does everything "
            "else without one"
        )


def _check_folder(path: Path) -> None:
    """TableError if the table's folder is not there and cannot be made, before anything is compiled."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TableError(
            f"-o {path}: its folder cannot be made ({error.strerror}); give one that can be written"
        ) from error


def _described(gpu: str | None) -> Device:
    """The GPU of a dry run."""
    if gpu is None:
        if not torch.cuda.is_available():
            raise TuningError("there is no CUDA GPU here: say which one is meant, --gpu h200, say")
        timer = IsolatedTimer()
        try:
            return replace(timer.facts().device, present=False)
        finally:
            timer.close()
    device = load_device(gpu)
    if device.backend != "cuda":
        raise RecipeError(f"--gpu must be a GPU, got {gpu} ({device}); h200, say")
    return device


def _families(request: Request, shapes: ModelShapes | None, device: Device) -> Sequence[AnyProblem]:
    if shapes is None:
        assert request.path is not None
        return checkpoint_problems(request.path, device)
    names: tuple[str, ...] = DEFAULT_FORMATS
    if request.formats is not None:
        names = tuple(filter(None, (name.strip() for name in request.formats.split(","))))
        if not names:
            raise RecipeError(
                f"--formats names no recipe, got {request.formats!r}; w4a16,w8a8, say"
            )
    families: list[AnyProblem] = [*linear_problems(shapes, layers_of(names), device)]
    if request.dry_run:
        policies = (load_recipe(name).kv for name in names)
        pages = dict.fromkeys(kv.key.format for kv in policies if kv and kv.key == kv.value)
        for name in pages:
            families += attention_problems(shapes, name, device)
    return families


def _settings(request: Request) -> Settings:
    minutes = request.budget_minutes
    return Settings(
        budget_seconds=math.inf if minutes is None else 60 * minutes,
        n_jobs=request.n_jobs or min(os.cpu_count() or 1, _MOST_JOBS),
    )


def _user_table(device: Device) -> Path:
    own = fingerprint(device)
    if own is None:
        raise TuningError(f"tuned tables are for GPUs, got {device}")
    return user_table(own)
