"""Which binaries are made for many problems, and what becomes of failures."""

from dataclasses import replace

import pytest

from fewbit.quant.compile_pool import CompileFailure
from fewbit.quant.errors import NoKernelError, TuningError
from fewbit.quant.kernel import Compiled, Reason
from fewbit.quant.ladder import Candidate
from fewbit.quant.tuning_binaries import build
from simulated_device import kernel
from tuned_tables import H200, problem

FAMILIES = [problem(m=1), problem(n=8192, m=1)]


def gemm(refuse=lambda posed: ()):
    """Two tiles up to M = 16, one above, each with three splits."""

    def configs(posed):
        tiles = (64, 128) if posed.size <= 16 else (256,)
        return tuple((("block_n", tile), ("split_k", s)) for tile in tiles for s in (1, 2, 4))

    return kernel("gemm", configs, lambda *a: (), refuse)


def builder(fails=lambda job: False):
    def compile_jobs(jobs, n_jobs, progress):
        assert n_jobs == 2
        progress(0, 3)
        made = (Compiled(64, 0, 1024, 128, "digest"),)
        return {job: CompileFailure("ERROR", "no") if fails(job) else made for job in jobs}

    return compile_jobs


def silent(done, total):
    pass


def test_a_binary_is_asked_for_once_by_each_family():
    asked = []

    def counting(jobs, n_jobs, progress):
        asked.extend(jobs)
        return builder()(jobs, n_jobs, progress)

    built = build(FAMILIES, [gemm()], 2, silent, counting)
    tiles = [(job.problem.n, dict(job.config)["block_n"]) for job in asked]
    assert sorted(tiles) == [(n, tile) for n in (4096, 8192) for tile in (64, 128, 256)]
    assert all(job.cc == (9, 0) for job in asked) and built.n_binaries == 3
    found = built.of(FAMILIES[1].at(64), [gemm()])
    assert found.keys() == {
        Candidate("gemm", (("block_n", 256), ("split_k", s))) for s in (1, 2, 4)
    }


def test_failures_are_missing_and_counted():
    fails = lambda job: dict(job.config)["block_n"] == 64  # noqa: E731
    built = build(FAMILIES, [gemm()], 2, silent, builder(fails))
    assert {dict(c.config)["block_n"] for c in built.of(FAMILIES[0], [gemm()])} == {128}
    assert built.failures() == (("ERROR no", 2),)


def test_nothing_compiles():
    with pytest.raises(NoKernelError, match="no kernel compiles here: ERROR no"):
        build(FAMILIES, [gemm()], 2, silent, builder(lambda job: True))


def test_nothing_to_compile():
    no = Reason("ARCH", "needs more, got less", "buy")
    refusing = gemm(lambda posed: (no,))
    plain = replace(gemm(), compile=None)
    other = replace(gemm(), op="attend")
    built = build(FAMILIES, [refusing, plain, other], 2, silent, builder())
    assert built.results == {} and built.of(FAMILIES[0], [refusing, plain, other]) == {}


def test_a_machine_without_a_capability():
    cpu = replace(H200, cc=None)
    with pytest.raises(TuningError, match="compute capability"):
        build([problem(machine=cpu)], [gemm()], 2, silent, builder())
