"""The architecture as tests: imports point downward, no cycles, mirrored tests, file sizes."""

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("quant", "calibrate", "export", "kernels_triton", "kernels_cuda")
FLOORS = {
    0: {"quant.errors", "quant.block", "quant.packed", "quant.format", "quant.kernel",
        "quant.registry", "quant.page_format"},
    1: {"quant.reference", "quant.cpu", "quant.cpu_int8", "quant.cpu_fle", "quant.tuned",
        "quant.recipe",
        "quant.names", "quant.hadamard", "quant.kv_policy", "quant.activation",
        "quant.byte_lanes", "quant.machine", "quant.cost_model", "quant.policy",
        "quant.ladder", "quant.tuned_table", "quant.tuned_text", "quant.tuned_file",
        "quant.kv_view", "quant.kv_softmax", "quant.kv_write",
        "quant.kv_stream_codes", "quant.kv_stream_predict", "quant.kv_stream_frame",
        "quant.kv_stream_piece", "quant.kv_stream_profile", "quant.kv_stream_control"},
    4: {"quant.evaluate", "quant.score", "quant.plan", "quant.inspect", "quant.doctor",
        "quant.autotune", "quant.cli", "quant.demo", "quant.generate", "quant.progress",
        "quant.kernel_report", "quant.timing", "quant.child", "quant.compile_pool",
        "quant.tuning_worker", "quant.gpu_timer", "quant.timed_case", "quant.search",
        "quant.model_error", "quant.model_shapes", "quant.tuning_binaries", "quant.tuning_record",
        "quant.autotune_report", "quant.autotune_command"},
}  # fmt: skip
FORBIDDEN = ("utils", "util", "helpers", "common", "base", "misc")
MAX_LINES = 450


def sources():
    return sorted(
        path for package in PACKAGES for path in (ROOT / package).rglob("*.py")
        if "data" not in path.parts
    )  # fmt: skip


def module_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def floor_of(module):
    for floor, members in FLOORS.items():
        if module in members:
            return floor
    if module.startswith(("quant.formats", "quant.codecs", "quant.native")):
        return 1
    if module.split(".")[0] in ("calibrate", "export", "kernels_triton", "kernels_cuda"):
        return 2
    return 3


@cache
def known_modules():
    return {module_of(path) for path in sources()}


def imports_of(path):
    """(module, is it at import time?) for every import inside the project."""
    package = path.relative_to(ROOT).parent.parts
    tree = ast.parse(path.read_text())
    top = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        base = package[: len(package) - node.level + 1]
        prefix = ".".join((*base, *(node.module.split(".") if node.module else ())))
        for alias in node.names:
            full = f"{prefix}.{alias.name}" if prefix else alias.name
            target = full if full in known_modules() else prefix
            if target in known_modules():
                yield target, id(node) in top


@pytest.mark.parametrize("path", sources(), ids=module_of)
def test_imports_point_downward(path):
    module = module_of(path)
    if module in ("quant",) or module in PACKAGES:
        return  # the package's own __init__ resolves public names lazily
    for target, _ in imports_of(path):
        if target in PACKAGES or target == module:
            continue
        assert floor_of(target) <= floor_of(module), f"{module} imports {target} above it"
        if floor_of(module) == 2 and floor_of(target) == 2:
            assert target.split(".")[0] == module.split(".")[0], (
                f"{module} and {target} are siblings on floor 2"
            )


def test_no_cycles():
    graph = {module_of(p): {t for t, _ in imports_of(p) if t not in PACKAGES} for p in sources()}
    state = {}

    def visit(module, trail):
        assert state.get(module) != "open", " -> ".join([*trail, module])
        if state.get(module) == "done":
            return
        state[module] = "open"
        for target in graph.get(module, ()):
            if target != module:
                visit(target, [*trail, module])
        state[module] = "done"

    for module in graph:
        visit(module, [])


@pytest.mark.parametrize("path", sources(), ids=module_of)
def test_every_module_has_its_mirrored_test(path):
    if path.name == "__init__.py":
        return
    folder = ROOT / "tests" / path.relative_to(ROOT).parent
    assert (folder / f"test_{path.stem}.py").is_file(), f"no test mirrors {path.relative_to(ROOT)}"


@pytest.mark.parametrize("path", sources(), ids=module_of)
def test_files_are_short_and_named_for_what_they_hold(path):
    assert path.stem not in FORBIDDEN
    assert len(path.read_text().splitlines()) <= MAX_LINES
    assert ast.get_docstring(ast.parse(path.read_text())), f"{path} has no docstring"


def test_no_broad_handlers_and_no_pass_through():
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ExceptHandler):
                names = ast.unparse(node.type) if node.type else "bare"
                assert names not in ("bare", "Exception", "BaseException"), f"{path}:{node.lineno}"
