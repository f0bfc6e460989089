"""Estimates: limits that hold exactly, and the direction in which each fact moves them."""

import math
from dataclasses import replace

import pytest

from fewbit.quant.cost_model import LATENCY_SECONDS, Tiling, Work, blocks_per_sm, launch_seconds
from fewbit.quant.kernel import Compiled, Peaks
from fewbit.quant.machine import load_device

H200 = load_device("h200")
BANDWIDTH = 4.8e12
FULL = Tiling(blocks=1320, threads=128, in_flight_bytes=40_000, registers=128, smem_bytes=60_000)


def work(**changes: float | str) -> Work:
    return replace(Work(bytes=0.0, ops=0.0, kind="bf16"), **changes)  # type: ignore[arg-type]


def test_memory_binds_at_the_bandwidth_if_enough_is_in_flight() -> None:
    assert FULL.in_flight_bytes * 132 * 3 > BANDWIDTH * LATENCY_SECONDS
    found = launch_seconds(work(bytes=48e6), FULL, H200)
    waves = math.ceil(1320 / 396) * 396 / 1320
    assert found == pytest.approx(48e6 / BANDWIDTH * waves)


def test_too_little_in_flight_costs_in_proportion() -> None:
    one_wave = replace(FULL, blocks=132, in_flight_bytes=10_000)
    half = replace(one_wave, in_flight_bytes=5_000)
    slow = launch_seconds(work(bytes=48e6), one_wave, H200)
    assert launch_seconds(work(bytes=48e6), half, H200) == pytest.approx(2 * slow)
    assert slow == pytest.approx(48e6 / (132 * 10_000 / LATENCY_SECONDS))


def test_a_started_wave_is_paid_whole() -> None:
    full = replace(FULL, blocks=396)
    more = replace(FULL, blocks=397)
    job = work(ops=1e12)
    assert launch_seconds(job, more, H200) == pytest.approx(
        launch_seconds(job, full, H200) * 2 * 396 / 397
    )


def test_idle_multiprocessors_cost_compute() -> None:
    job = work(ops=1e12)
    all_busy = launch_seconds(job, replace(FULL, blocks=132), H200)
    half_busy = launch_seconds(job, replace(FULL, blocks=66), H200)
    assert half_busy == pytest.approx(2 * all_busy)
    assert all_busy == pytest.approx(1e12 / (989.5e12 * 0.8))


def test_conversions_bind_where_they_are_many() -> None:
    rate = 66.9e12 / 4
    assert launch_seconds(work(alu=rate), replace(FULL, blocks=396), H200) == pytest.approx(1.0)
    a100 = load_device("a100-80gb")
    fp32 = a100.peak_ops_per_second.fp32
    assert fp32 is not None
    whole = replace(FULL, blocks=108)
    assert launch_seconds(work(alu=fp32 / 2), whole, a100) == pytest.approx(1.0)


def test_what_comes_after_is_added() -> None:
    job = work(bytes=1e6)
    later = replace(job, extra_seconds=1e-3)
    assert launch_seconds(later, FULL, H200) == pytest.approx(
        launch_seconds(job, FULL, H200) + 1e-3
    )


def test_spills_and_blocks_that_do_not_fit_take_for_ever() -> None:
    spilled = Compiled(registers=255, stack_bytes=8, smem_bytes=0, threads=128, digest="")
    assert launch_seconds(work(bytes=1.0), FULL, H200, spilled) == math.inf
    assert launch_seconds(work(bytes=1.0), replace(FULL, smem_bytes=300_000), H200) == math.inf


@pytest.mark.parametrize(
    ("registers", "smem", "threads", "blocks"),
    [(32, 0, 128, 16), (128, 0, 128, 4), (255, 0, 256, 1), (32, 100_000, 128, 2), (33, 0, 128, 12)],
)
def test_blocks_of_a_multiprocessor(registers: int, smem: int, threads: int, blocks: int) -> None:
    tiling = Tiling(1, threads, 0.0, registers, smem)
    assert blocks_per_sm(tiling, H200) == blocks
    compiled = Compiled(registers, 0, smem, threads, "")
    guessed = replace(tiling, registers=255, smem_bytes=200_000)
    assert blocks_per_sm(guessed, H200, compiled) == blocks


def test_unknown_rates_are_left_out() -> None:
    blind = replace(H200, bandwidth_bytes_per_second=None, peak_ops_per_second=Peaks())
    assert launch_seconds(work(bytes=1e9, ops=1e12), FULL, blind) == 1.0
    known = replace(blind, bandwidth_bytes_per_second=BANDWIDTH)
    assert launch_seconds(work(bytes=48e6, ops=1e15), replace(FULL, blocks=396), known) < 1e-4
