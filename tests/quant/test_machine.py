"""Machines as data: the schema, the packaged files, the machine at hand, the limit."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from fewbit.quant import machine
from fewbit.quant.errors import RecipeError
from fewbit.quant.formats.int_group import IntGroupOptions
from fewbit.quant.kernel import Device, Problem
from fewbit.quant.machine import (
    device_facts,
    device_names,
    limit_of,
    load_device,
    match_gpu,
    parse_device,
    this_device,
)

GIB = 1 << 30
NAMES = ["a100-80gb", "b200", "cpu", "h100", "h200", "l40s", "rtx4090", "rtx5090"]


@pytest.fixture
def table() -> dict:
    folder = machine.files("fewbit.quant") / "devices"
    return json.loads((folder / "h200.json").read_text(encoding="utf-8"))


@pytest.fixture(autouse=True)
def ask_again():
    yield
    this_device.cache_clear()


def on(device: Device, m: int, *, bits: int = 4, activation: str | None = None) -> Problem:
    options = IntGroupOptions(bits, 128 if bits < 8 else "row")
    return Problem(
        "int_group", options, 1, m, 4096, 4096, torch.bfloat16, device.backend, activation, device
    )


def test_eight_machines_are_described() -> None:
    assert device_names() == NAMES
    for name in NAMES:
        device = load_device(name)
        assert device.name == name and not device.present and len(device.source) > 40
        assert (device.cc is None) == (device.backend == "cpu")
        peaks = device.peak_ops_per_second
        assert peaks.bf16 and peaks.int8 and device.bandwidth_bytes_per_second
        assert peaks.bf16 / device.bandwidth_bytes_per_second < 500  # operations a byte


def test_figures_of_the_h200() -> None:
    device = load_device("h200")
    assert device.cc == (9, 0) and device.sms == 132 and str(device).endswith("sm_90")
    assert device.smem_block_bytes == 227 * 1024 and device.registers == 65536
    assert device.bandwidth_bytes_per_second == 4.8e12
    assert device.peak_ops_per_second.bf16 == 989.5e12
    assert device.peak_ops_per_second.fp4 is None
    assert hash(device) == hash(load_device("h200"))


@pytest.mark.parametrize(("name", "nearest"), [("h20", "h200"), ("RTX4090", "rtx4090")])
def test_an_unknown_machine_names_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(RecipeError, match=f"did you mean '{nearest}'"):
        load_device(name)


def test_a_machine_of_ones_own(table: dict, tmp_path) -> None:
    path = tmp_path / "lab.json"
    path.write_text(json.dumps(table | {"sms": 7}))
    found = load_device(str(path))
    assert found.sms == 7 and found.name == "lab"
    for wrong in (tmp_path / "none.json", tmp_path):
        with pytest.raises(RecipeError, match=r"cannot be read|unknown device"):
            load_device(str(wrong))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"smem": 1}, "unknown key 'smem'"),
        ({"sms": -1}, "sms must be a whole number above 0 or null, got -1"),
        ({"sms": 1.5}, "sms must be a whole number"),
        ({"sms": True}, "sms must be a whole number"),
        ({"sms": None}, "sms must be a number, got null"),
        ({"memory_bytes": "80 GB"}, "memory_bytes must be a whole number"),
        ({"bandwidth_bytes_per_second": 0}, "bandwidth_bytes_per_second must be a number above 0"),
        ({"bandwidth_bytes_per_second": float("nan")}, "must be a number above 0"),
        ({"launch_seconds": "1"}, "launch_seconds must be"),
        ({"cc": [9]}, r"cc must be \[major, minor\]"),
        ({"cc": "9.0"}, "cc must be"),
        ({"cc": [9, -1]}, "cc must be"),
        ({"cc": None}, "cc must be"),
        ({"backend": "rocm"}, "backend must be 'cuda' or 'cpu', got 'rocm'"),
        ({"backend": "cpu"}, "null for a CPU"),
        ({"isa": "avx2"}, "isa must list"),
        ({"isa": ["avx3"]}, "isa must list"),
        ({"title": ""}, "title must be a text"),
        ({"peak_ops_per_second": 1e12}, "must be a JSON object, got float"),
        ({"peak_ops_per_second": {"fp16": 1}}, "missing fp32, bf16"),
    ],
)
def test_a_wrong_description_names_the_key(table: dict, change: dict, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_device("lab", json.dumps(table | change))


def test_every_key_is_needed(table: dict) -> None:
    for key in table:
        rest = {name: value for name, value in table.items() if name != key}
        with pytest.raises(RecipeError, match=f"missing {key}; null stands for unknown"):
            parse_device("lab", json.dumps(rest))
    for text in ("", "[1]", "{", "null"):
        with pytest.raises(RecipeError, match=r"not valid JSON|must be a JSON object"):
            parse_device("lab", text)


def test_rates_may_be_unknown(table: dict) -> None:
    found = parse_device("lab", json.dumps(table | {"bandwidth_bytes_per_second": None}))
    assert limit_of(on(found, 1), 1.0) is None


@pytest.mark.parametrize(
    ("cc", "sms", "gib", "name"),
    [
        ((8, 0), 108, 79.3, "a100-80gb"),
        ((9, 0), 132, 79.2, "h100"),
        ((9, 0), 132, 139.8, "h200"),
        ((9, 0), 132, 95.0, None),  # a board that is not described
        ((9, 0), 16, 16.0, None),  # a slice of a GPU
        ((10, 0), 148, 178.4, "b200"),
        ((12, 0), 170, 31.4, "rtx5090"),
    ],
)
def test_gpus_are_told_apart_by_what_they_are(cc, sms: int, gib: float, name: str | None) -> None:
    found = match_gpu(cc, sms, int(gib * GIB))
    assert (found.name if found else None) == name


def fake_gpu(monkeypatch: pytest.MonkeyPatch, **facts: object) -> None:
    this_device.cache_clear()
    found = SimpleNamespace(**facts)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: found)


def test_a_gpu_at_hand_is_found_whatever_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpu(
        monkeypatch, name="RTX 4090", major=9, minor=0, multi_processor_count=132,
        total_memory=140 * GIB,
    )  # fmt: skip
    assert this_device() == replace(load_device("h200"), present=True)


def test_a_gpu_that_is_not_described_has_no_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpu(
        monkeypatch, name="NVIDIA H200 MIG 1g.18gb", major=9, minor=0, multi_processor_count=16,
        total_memory=16 * GIB, shared_memory_per_multiprocessor=233472,
    )  # fmt: skip
    found = this_device("cuda")
    assert found.name == "sm90-16" and found.cc == (9, 0) and found.present
    assert found.smem_sm_bytes == 233472 and found.smem_block_bytes is None
    assert limit_of(on(found, 1), 1.0) is None


def test_the_cpu_at_hand() -> None:
    found = this_device("cpu")
    assert found.present and found.backend == "cpu" and found.sms >= 1
    capability = torch.backends.cpu.get_cpu_capability()
    assert ("avx512" in found.isa) == (capability == "AVX512")
    assert limit_of(on(found, 1), 1.0) is None
    assert device_facts(found)["present"] is True


def test_limits_by_hand() -> None:
    h200 = load_device("h200")
    weight = 4096 * 4096 * 4.125 / 8
    small = limit_of(on(h200, 16), 1e-3)
    assert small is not None and small.bound == "memory"
    assert small.seconds == pytest.approx((weight + 16 * 8192 * 2) / 4.8e12)
    assert small.share == pytest.approx(small.seconds / 1.001e-3)
    large = limit_of(on(h200, 2048), 1e-3)
    assert large is not None and large.bound == "compute"
    assert large.seconds == pytest.approx(2 * 2048 * 4096**2 / 989.5e12)
    rounded = limit_of(on(h200, 2048, bits=8, activation="int8_token"), 1e-3)
    assert rounded is not None and rounded.seconds == pytest.approx(large.seconds * 989.5 / 1979)
    tiny = limit_of(replace(on(h200, 1), n=128, k=128), 0.0)
    assert tiny is not None and (tiny.bound, tiny.seconds, tiny.share) == ("launch", 1e-6, 1.0)


def test_what_has_no_limit() -> None:
    h200 = load_device("h200")
    assert limit_of(replace(on(h200, 1), machine=None), 1.0) is None
    assert limit_of(replace(on(h200, 1), dtype=torch.float64), 1.0) is None
    assert limit_of(replace(on(h200, 1), format="elsewhere"), 1.0) is None
