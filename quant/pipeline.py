"""`quantize`: a checkpoint goes in, a smaller one comes out, unit by unit.

    validate → preflight → for each unit: (statistics → passes → pack → write) → verify → publish

Two ways through the same plan and the same writer. If no pass asks for statistics, units are runs of
source tensors, read and rounded in row slabs: no model graph, no transformers, any architecture.
Otherwise units are decoder blocks; each is run on the output of the quantized blocks before it.

Nothing can load the output before it is complete: `config.json` is written last, after every stored
byte was read back and compared with the checksum of what was computed. Ranking formats, evaluating
and gates are elsewhere.
"""

import json
import math
import os
import platform
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..calibrate.protocol import Plan, PlannedPass, plan_passes
from ..export.checkpoint import Checkpoint
from ..export.coded_files import split_name
from ..export.report import UNTIED, Report
from ..export.shards import UnitPlan
from ..export.writer import CheckpointWriter
from . import publish
from .allocator import freed_blocks_returned
from .device import calibration_dtype, resolve_device
from .errors import CalibrationError, CheckpointError, RecipeError
from .kv_policy import KVPolicy
from .layout import plan_tensors, unit_of
from .preflight import check_resources, peak_resident_bytes, text_config
from .recipe import Recipe, load_recipe
from .transform import transform_model
from .units import DataFreeUnits, Job, UnitSource, count_stored

MAX_SHARD_BYTES = 4 << 30


@dataclass(frozen=True)
class Progress:
    """Where a run stands, after each unit."""

    unit: str
    done: int
    total: int
    bits_per_weight: float
    worst: tuple[str, float] | None  # tensor and relative output (or weight) error
    seconds_left: float | None  # None until there is something to tell it from


def quantize(
    source: str | Path,
    out: str | Path,
    *,
    recipe: str = "w4a8kv4",
    settings: Sequence[str] = (),
    calib: str | None = None,
    samples: int | None = None,
    length: int | None = None,
    device: str = "auto",
    seed: int = 0,
    restart: bool = False,
    revision: str | None = None,
    progress: Callable[[Progress], None] | None = None,
    announce: Callable[[str], None] | None = None,
) -> Report:
    """Quantize a folder or hub id into `out`; the same keys as the command line.

    Resumes an unfinished run of the same recipe and source. Returns the report that is also written
    to `out`. Raises FewbitError subclasses only for what the user can mend.
    """
    started = time.monotonic()
    job = _prepare(
        source, Path(out), recipe, _with_calibration_keys(settings, samples, length),
        calib, device, seed, revision,
    )  # fmt: skip
    publish.check_folder(job.out, restart, job.checkpoint.folder)
    units, work = _units(job)
    outlook = check_resources(
        job.out, sum(unit.n_bytes for unit in units), job.checkpoint, job.calibration,
        job.recipe.lossless,
    )  # fmt: skip
    if announce is not None:
        announce(outlook)
    if restart:
        publish.discard(job.out)
    writer = CheckpointWriter(job.out, units, _identity(job), MAX_SHARD_BYTES, job.recipe.lossless)
    try:
        done = writer.open()
        with freed_blocks_returned():
            _run(job, writer, work, done, started, progress)
        command = _command(job, recipe, _with_calibration_keys(settings, samples, length), calib)
        report = publish.finish(job, writer, {**_facts(job, started), "command": command})
        writer.finish()
    finally:
        writer.abandon()
    return report


def _with_calibration_keys(
    settings: Sequence[str], samples: int | None, length: int | None
) -> tuple[str, ...]:
    extra = [("samples", samples), ("length", length)]
    return (*settings, *(f"calibration.{key}={value}" for key, value in extra if value is not None))


def _prepare(
    source: str | Path,
    out: Path,
    recipe_name: str,
    settings: Sequence[str],
    calib: str | None,
    device: str,
    seed: int,
    revision: str | None,
) -> Job:
    _check_seed(seed)
    recipe = load_recipe(recipe_name, settings)
    uses = [(use.name, use.keys) for use in recipe.passes]
    steps = plan_passes(uses) if recipe.quantizes else Plan((), (), ())
    target = resolve_device(device)
    checkpoint = Checkpoint.open(source, revision, as_stored=recipe.keeps_bytes)
    _refuse_policy(checkpoint, recipe)
    _refuse_names(checkpoint)
    _refuse_passes(checkpoint, steps.passes)
    _check_kv(checkpoint, recipe.kv)
    model = transform_model(checkpoint, steps, seed, target)
    plan = plan_tensors(recipe, model.config, model.source.tensors)
    for name, origin in model.source.copies.items():
        plan[name] = replace(
            plan[name], reason=f"{UNTIED} {origin}, which the source stores for both"
        )
    if recipe.quantizes and not any(tensor.rule for tensor in plan.values()):
        raise RecipeError(
            f"{source}: recipe {recipe.name!r} would quantize none of its {len(plan)} tensors; "
            f"check weights.ignore, or use --recipe identity to copy"
        )
    names = " and ".join(item.step.name for item in steps.model)
    job = Job(
        checkpoint, recipe, steps.passes, plan, out, seed, target, None, steps.block, model, names
    )
    return _with_calibration(job, calib) if job.calibrated else job


def _refuse_policy(checkpoint: Checkpoint, recipe: Recipe) -> None:
    """RecipeError if a cache policy is asked of weights that only their own maker's code can run."""
    method = publish.source_quantization(checkpoint.config)
    if recipe.keeps_bytes and recipe.kv is not None and method is not None:
        raise RecipeError(
            f"{checkpoint.name} is quantized already, and recipe {recipe.name!r} would store it as it "
            f"is with a cache policy that nothing could follow; use --recipe lossless"
        )


def _refuse_names(checkpoint: Checkpoint) -> None:
    """CheckpointError if a tensor has the name of a plane: the output could not be read."""
    for name in checkpoint.tensors:
        if split_name(name) is not None:
            raise CheckpointError(
                f"{checkpoint.name}: tensor {name!r} has the name of a coded tensor's plane; fewbit's "
                f"own checkpoints are no source, others must rename it"
            )


def _check_kv(checkpoint: Checkpoint, policy: KVPolicy | None) -> None:
    """RecipeError if the model's cache cannot follow the policy: tried on a graph without weights."""
    if policy is None:
        return
    from ..calibrate.skeleton import build_skeleton
    from .kv_install import install

    install(build_skeleton(checkpoint.config, torch.bfloat16), policy)


def _refuse_passes(checkpoint: Checkpoint, passes: Sequence[PlannedPass]) -> None:
    named = checkpoint.config.get("architectures")
    architecture = str(named[0]) if isinstance(named, list) and named else "unknown"
    for item in passes:
        sentence = item.step.refuse(architecture, item.options)
        if sentence:
            raise RecipeError(f"pass {item.step.name} cannot run on {architecture}: {sentence}")


def _with_calibration(job: Job, calib: str | None) -> Job:
    from ..calibrate.data import load_calibration, window_start
    from ..calibrate.skeleton import check_architecture, load_tokenizer

    check_architecture(job.checkpoint.config)
    keys, config = job.recipe.calibration, text_config(job.checkpoint.config)
    tokenizer = load_tokenizer(job.checkpoint.folder)
    data = load_calibration(
        calib, tokenizer, keys.samples, keys.length, job.seed,
        context=_whole_number(config.get("max_position_embeddings")),
        first_token=window_start(str(config.get("model_type")), tokenizer),
    )  # fmt: skip
    top, vocabulary = int(data.windows.max()), _whole_number(config.get("vocab_size"))
    if vocabulary is not None and top >= vocabulary:
        raise CalibrationError(
            f"the tokenizer yields id {top}, but the model's vocabulary has {vocabulary} entries; "
            f"put the tokenizer that belongs to this model into {job.checkpoint.folder}"
        )
    return replace(job, calibration=data)


def _whole_number(value: Any) -> int | None:
    return value if isinstance(value, int) else None


def _check_seed(seed: int) -> None:
    if not 0 <= seed < 1 << 63:
        raise RecipeError(f"--seed must be a whole number from 0 to 2^63 - 1, got {seed}")


def _identity(job: Job) -> dict[str, Any]:
    """What decides the output's bytes; a resumed run must agree in every key."""
    return {
        "recipe": json.loads(job.recipe.text),  # a tree, so that a difference can be named
        "source": job.checkpoint.fingerprint,
        "calibration": job.calibration.fingerprint() if job.calibration else None,
        "seed": job.seed,
        "environment": environment(job),
    }


def environment(job: Job) -> dict[str, Any]:
    """Versions and machine facts on which the last bits of floating-point sums depend."""
    from importlib.metadata import version

    facts: dict[str, Any] = {"fewbit": version("fewbit"), "torch": torch.__version__}
    if job.calibrated:
        facts["transformers"] = version("transformers")
        facts["device"] = job.device.type
        facts["dtype"] = str(calibration_dtype(job.device, job.checkpoint.dtype))
        facts["threads"] = torch.get_num_threads()
        facts["cpu"] = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
        if job.device.type == "cuda":
            facts["gpu"] = torch.cuda.get_device_name(job.device)
    return facts


def _units(job: Job) -> tuple[list[UnitPlan], UnitSource]:
    if job.calibrated:
        from .blockwise import BlockwiseUnits

        source: UnitSource = BlockwiseUnits(job)
    else:
        source = DataFreeUnits(job)
    return [unit_of(name, keys, job.plan) for name, keys in source.members], source


def _run(
    job: Job,
    writer: CheckpointWriter,
    source: UnitSource,
    done: int,
    started: float,
    progress: Callable[[Progress], None] | None,
) -> None:
    if done == len(source.members):
        return
    resumed_at, costs = time.monotonic(), _costs(job, source)
    for index in range(len(source.members)):
        if index < done:
            source.skip(index, writer)
            continue
        rows: list[Any] = []
        amend = partial(count_stored, job, source.members[index][1], rows)
        writer.write_unit(source.tensors(index, rows), rows, amend)
        if progress is not None:
            seconds = time.monotonic() - resumed_at
            left = _seconds_left(seconds, sum(costs[done : index + 1]), sum(costs[index + 1 :]))
            progress(_progress(writer, source, index, left))


def _costs(job: Job, source: UnitSource) -> list[int]:
    """Relative time that each unit takes: weights to be rounded, or to be copied if none is."""
    tensors = [[job.plan[key] for key in keys] for _, keys in source.members]
    rounds = any(item.rule for item in job.plan.values())
    return [sum(math.prod(item.shape) for item in unit if item.rule or not rounds)
            for unit in tensors]  # fmt: skip


def _seconds_left(seconds: float, done: int, left: int) -> float | None:
    if not left:
        return 0.0
    return seconds / done * left if done else None


def _progress(
    writer: CheckpointWriter, source: UnitSource, index: int, seconds_left: float | None
) -> Progress:
    rows = [row for unit in writer.rows for row in unit]
    weights = sum(row["n_weights"] for row in rows)
    stored = sum(row["n_bytes"] for row in rows)
    if writer.lossless and not rows:  # nothing is rounded: then of all that was stored so far
        units = writer.units[: index + 1]
        weights = sum(math.prod(spec.shape) for unit in units for spec in unit.tensors.values())
        stored = sum(item.end - item.begin for unit in writer.finished for item in unit)
    errors = [(row["name"], row["output_error"] or row["relative_error"]) for row in rows]
    return Progress(
        unit=source.members[index][0],
        done=index + 1,
        total=len(source.members),
        bits_per_weight=8 * stored / weights if weights else 0.0,
        worst=max(errors, key=lambda item: item[1]) if errors else None,
        seconds_left=seconds_left,
    )


def _command(job: Job, recipe: str, settings: Sequence[str], calib: str | None) -> str:
    """The command line of this run for the report, without folders of this machine."""
    words = ["fewbit", "quantize", publish.public_name(job.checkpoint), "-o", job.out.name]
    words += ["--recipe", Path(recipe).name, *(w for item in settings for w in ("--set", item))]
    words += ["--calib", Path(calib).name] if calib is not None else []
    return shlex.join([*words, "--seed", str(job.seed)])


def _facts(job: Job, started: float) -> dict[str, Any]:
    """Times and memory, for the report only (never for anything that must be reproducible)."""
    return {
        "wall_seconds": time.monotonic() - started,
        "peak_resident_bytes": peak_resident_bytes(),
        "environment": environment(job),
        "pid": os.getpid(),
    }
