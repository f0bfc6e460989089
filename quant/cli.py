"""The command `fewbit`. Flags and recipe keys share names; every error is one line, exit code 1.

Exit codes: 0 done, 1 named error, 2 wrong usage, 3 finished but the quality gate failed or a
fallback happened that the recipe does not allow, 130 interrupted. `--json -` prints one JSON object
and nothing else on stdout. Nothing heavy is imported before a command needs it, so `--help` is
instant.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import FewbitError

if TYPE_CHECKING:
    from .recipe import GateKeys

EXIT_ERROR, EXIT_GATE, EXIT_INTERRUPTED = 1, 3, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    run: Callable[[argparse.Namespace], int] = options.run
    try:
        return run(options)
    except FewbitError as error:
        if options.debug:
            raise
        message = " ".join(str(error).split())  # of a library's error, too: one line
        print(f"fewbit: {type(error).__name__}: {message}", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        goes_on = options.command in ("quantize", "autotune", "export")
        resumes = "; the same command resumes" if goes_on else ""
        print(f"fewbit: interrupted{resumes}", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        return EXIT_ERROR


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="fewbit", description="Quantize language models to few bits, load them, measure them."
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks of named errors")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (
        _add_quantize, _add_eval, _add_generate, _add_inspect, _add_export, _add_kernels,
        _add_autotune,
    ):  # fmt: skip
        add(commands)
    recipes = commands.add_parser("recipes", help="list the packaged recipes, or print one")
    recipes.add_argument("name", nargs="?")
    recipes.set_defaults(run=_recipes)
    doctor = commands.add_parser("doctor", help="what this machine has, and what is missing")
    doctor.add_argument("--json", metavar="FILE", help="write JSON to FILE, - for stdout")
    doctor.set_defaults(run=_doctor)
    demo = commands.add_parser("demo", help="the main job on the bundled model")
    demo.add_argument("-o", "--out", help="keep the result in this folder")
    demo.add_argument("--recipe", default="w4a8kv4")
    demo.set_defaults(run=_demo)
    return parser


def _add_quantize(commands: Any) -> None:
    parser = commands.add_parser("quantize", help="write a smaller checkpoint")
    parser.add_argument("source", help="folder or hub id (safetensors)")
    parser.add_argument("-o", "--out", required=True, help="folder; an unfinished run resumes")
    parser.add_argument(
        "--recipe", default="w4a8kv4", help="name (see `fewbit recipes`) or FILE.toml"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="settings",
        help="change a recipe key, e.g. weights.bits=3, pass.gptq.damping=0.02, allow_fallback=true",
    )  # fmt: skip
    parser.add_argument("--calib", help="FILE.txt, FILE.jsonl or hub data set; bundled if absent")
    parser.add_argument("--samples", type=int, help="calibration windows")
    parser.add_argument("--length", type=int, help="tokens in a window")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:i")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--revision", help="of a hub id; the resolved commit is recorded")
    parser.add_argument("--restart", action="store_true", help="discard what an earlier run left")
    parser.add_argument("--quiet", action="store_true", help="no progress, no summary")
    parser.set_defaults(run=_quantize)


def _add_eval(commands: Any) -> None:
    parser = commands.add_parser("eval", help="perplexity, and distance from a reference")
    parser.add_argument("path")
    parser.add_argument("--against", metavar="SRC", help="reference checkpoint, run in float32")
    parser.add_argument("--text", metavar="FILE", help="evaluation text; bundled if absent")
    parser.add_argument("--length", type=int, help="tokens in a window")
    parser.add_argument("--max-tokens", type=int)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--decode", action="store_true", help="through the KV cache, step by step")
    parser.add_argument("--json", metavar="FILE", help="write JSON to FILE, - for stdout")
    parser.set_defaults(run=_eval)


def _add_generate(commands: Any) -> None:
    parser = commands.add_parser("generate", help="continue a prompt")
    parser.add_argument("path")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.set_defaults(run=_generate)


def _add_inspect(commands: Any) -> None:
    parser = commands.add_parser("inspect", help="what is inside a quantized checkpoint")
    parser.add_argument("path")
    parser.add_argument("--verify", action="store_true", help="check every checksum and shape")
    parser.add_argument("--json", metavar="FILE", help="write JSON to FILE, - for stdout")
    parser.set_defaults(run=_inspect)


def _add_export(commands: Any) -> None:
    parser = commands.add_parser("export", help="a checkpoint in another form, nothing rounded")
    parser.add_argument("path", help="folder or hub id")
    parser.add_argument("-o", "--out", required=True, help="folder; an unfinished export goes on")
    parser.add_argument(
        "--to", required=True, metavar="FORM",
        help="dense: what `lossless` was given, byte for byte; dfloat11: of bf16 checkpoints",
    )  # fmt: skip
    parser.add_argument("--quiet", action="store_true", help="no progress, no summary")
    parser.set_defaults(run=_export)


def _add_kernels(commands: Any) -> None:
    parser = commands.add_parser("kernels", help="which kernel runs what, and why not the others")
    parser.add_argument(
        "--op", metavar="OP", default="linear", help="linear, attend, hadamard, ..."
    )
    parser.add_argument(
        "--format", metavar="F", dest="weights",
        help="of weights, with its options: int_group:bits=8,group=row",
    )  # fmt: skip
    parser.add_argument("--activation", metavar="A", help="format of inputs, e.g. int8_token; none")
    parser.add_argument("--shape", metavar="MxNxK", help="explain one problem, not the table")
    parser.add_argument("--gpu", metavar="NAME", help="a described machine (h200, cpu, FILE.json)")
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16", help="of x"
    )
    parser.add_argument("--json", metavar="FILE", help="write JSON to FILE, - for stdout")
    parser.set_defaults(run=_kernels)


def _add_autotune(commands: Any) -> None:
    parser = commands.add_parser("autotune", help="find the fastest kernels for a model's products")
    parser.add_argument("path", nargs="?", help="folder that `fewbit quantize` wrote")
    parser.add_argument("--shapes", metavar="NAME", help="packaged shapes (llama3-8b) or FILE.json")
    parser.add_argument(
        "--formats", metavar="R,R", help="recipes whose formats --shapes is tuned for"
    )
    parser.add_argument("--dry-run", action="store_true", help="compile and rank, time nothing")
    parser.add_argument("--gpu", metavar="NAME", help="of a dry run: h200, FILE.json")
    parser.add_argument("--budget", type=float, metavar="MINUTES", help="of time on the GPU")
    parser.add_argument("-o", "--out", metavar="TABLE.json", help="the user's table if absent")
    parser.add_argument("--jobs", type=int, help="compiler processes; one a core if absent")
    parser.add_argument("--json", metavar="FILE", help="write JSON to FILE, - for stdout")
    parser.set_defaults(run=_autotune)


def _quantize(options: argparse.Namespace) -> int:
    from ..export.report import summary_text
    from .pipeline import quantize
    from .progress import ProgressBar

    gate = _gate_of(options)  # a recipe that is wrong costs no work
    with ProgressBar(options.quiet) as bar:
        report = quantize(
            options.source,
            options.out,
            recipe=options.recipe,
            settings=options.settings,
            calib=options.calib,
            samples=options.samples,
            length=options.length,
            device=options.device,
            seed=options.seed,
            restart=options.restart,
            revision=options.revision,
            progress=bar.show,
            announce=bar.say,
        )
    if not options.quiet:
        print(summary_text(report))
    refused = bool(report.fallbacks) and not report.allow_fallback
    if refused:
        print(
            f"fewbit: {len(report.fallbacks)} fallbacks, see {Path(options.out) / 'report.html'}; "
            f"give more --samples, or accept them with --restart --set allow_fallback=true",
            file=sys.stderr,
        )
    passed = _quality_gate(options, gate)  # measured after fallbacks, too: both are reported
    return EXIT_GATE if refused or not passed else 0


def _gate_of(options: argparse.Namespace) -> "GateKeys":
    """The `[gate]` of the recipe as the run uses it, with every flag that sets a key."""
    from .recipe import load_recipe

    flags = (("samples", options.samples), ("length", options.length))
    keys = (f"calibration.{key}={value}" for key, value in flags if value is not None)
    return load_recipe(options.recipe, [*options.settings, *keys]).gate


def _quality_gate(options: argparse.Namespace, gate: "GateKeys") -> bool:
    """Whether the result keeps the bounds of `gate`, measured on the bundled evaluation text."""
    if not gate.perplexity_ratio and not gate.mean_kl:
        return True
    from .evaluate import evaluate

    found = evaluate(options.out, against=options.source, device=options.device)
    failed = []
    for name, value, bound in (
        ("perplexity_ratio", found.perplexity_ratio, gate.perplexity_ratio),
        ("mean_kl", found.kl_mean, gate.mean_kl),
    ):
        if bound and not (value is not None and value <= bound):
            failed.append(f"{name} is {value}, the recipe allows {bound}")
    for line in failed:
        print(f"fewbit: quality gate: {line}", file=sys.stderr)
    return not failed


def _eval(options: argparse.Namespace) -> int:
    from .evaluate import evaluate

    result = evaluate(
        options.path,
        against=options.against,
        text=options.text,
        length=options.length,
        max_tokens=options.max_tokens,
        device=options.device,
        decode=options.decode,
    )
    _emit(options.json, result.to_json(), result.text())
    return 0


def _generate(options: argparse.Namespace) -> int:
    from .generate import generate

    text = generate(
        options.path,
        options.prompt,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        seed=options.seed,
        device=options.device,
    )
    print(text)
    return 0


def _inspect(options: argparse.Namespace) -> int:
    from .inspect import inspect

    found = inspect(options.path, verify=options.verify)
    _emit(options.json, found.to_json(), found.text())
    return 0


def _export(options: argparse.Namespace) -> int:
    from .export_command import export

    def show(name: str, done: int, total: int) -> None:
        print(f"{name}: {done / max(total, 1):.0%}", file=sys.stderr)

    found = export(options.path, options.out, options.to, None if options.quiet else show)
    if not options.quiet:
        print(found.text())
    return 0


def _kernels(options: argparse.Namespace) -> int:
    from .kernel_report import kernel_report

    value, text = kernel_report(
        op=options.op,
        weights=options.weights,
        activation=options.activation,
        shape=options.shape,
        gpu=options.gpu,
        dtype=options.dtype,
    )
    _emit(options.json, value, text)
    return 0


def _autotune(options: argparse.Namespace) -> int:
    from .autotune_command import Request, autotune_command
    from .autotune_report import TuningBar

    request = Request(
        path=options.path,
        shapes=options.shapes,
        gpu=options.gpu,
        dry_run=options.dry_run,
        budget_minutes=options.budget,
        out=options.out,
        formats=options.formats,
        n_jobs=options.jobs,
    )
    with TuningBar() as bar:
        report = autotune_command(request, bar)
    _emit(options.json, report.as_dict(), report.text())
    return 0


def _recipes(options: argparse.Namespace) -> int:
    from .recipe import load_recipe, read_recipe_text, recipe_names

    if options.name:
        print(read_recipe_text(options.name)[1], end="")
        return 0
    for name in recipe_names():
        print(f"{name:16s} {load_recipe(name).summary}")
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from .doctor import doctor, doctor_text

    found = doctor()
    _emit(options.json, found, doctor_text(found))
    return 0


def _demo(options: argparse.Namespace) -> int:
    from .demo import demo

    return demo(options.out, options.recipe)


def _emit(target: str | None, value: dict[str, Any], text: str) -> None:
    """JSON to a file or stdout, otherwise text."""
    if target is None:
        print(text)
        return
    encoded = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    if target == "-":
        print(encoded)
    else:
        try:
            Path(target).write_text(encoded + "\n", encoding="utf-8")
        except OSError as error:
            raise FewbitError(f"--json {target}: cannot write ({error.strerror})") from error


if __name__ == "__main__":
    sys.exit(main())
