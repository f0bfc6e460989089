"""A device that is not there: a `Timer` over made-up times, with what real ones do to a tuner.

    true seconds = model's seconds · exp(σ · e)
    e            = √.2 · of the kernel + √.4 · of each choice's value + √.2 · of each pair of values
                   + √.2 · of this config alone

Each part is normal and drawn by hashes of its name and the seed, so that the truth does not depend on
what is asked first. σ is such that the model's order has a given rank correlation with the true one.

Samples: noise of 1 to 3 % (drawn for each candidate), outliers of 2 to 10 times in 2 % of samples, a
slow drift of ± 2 %. 5 % of the candidates kill their worker, 2 % hang; half of both do so when they are
verified, half when they are sampled. 1 % return wrong results. The clock is virtual.
"""

import hashlib
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations, product

import numpy as np

from fewbit.quant.cost_model import Tiling, Work, launch_seconds
from fewbit.quant.kernel import AnyProblem, Compile, Compiled, Config, Kernel, Problem, Reason
from fewbit.quant.timing import Candidate, Fault

DEATHS, HANGS, WRONG = 0.05, 0.02, 0.01
OUTLIERS, DRIFT, DRIFT_SECONDS = 0.02, 0.02, 60.0
HANG_SECONDS, RESTART_SECONDS, VERIFY_SECONDS = 2.0, 3.0, 0.02
CALLS = 20  # of a sample


@dataclass(frozen=True)
class Shares:
    """Of the variance of the model's error: see the module's text."""

    kernel: float = 0.2
    choices: float = 0.4
    pairs: float = 0.2
    alone: float = 0.2


@cache
def normal(*key: object) -> float:
    """A standard normal number that belongs to `key`."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return random.Random(int.from_bytes(digest)).gauss()


def errors(model: Mapping[Candidate, float], seed: int, shares: Shares) -> np.ndarray:
    """e [n] of each candidate, of mean 0 and variance 1 or so."""
    found = []
    for candidate in model:
        kernel, config = candidate.kernel, candidate.config
        parts = {
            "kernel": [()],
            "choices": [(choice,) for choice in config],
            "pairs": list(combinations(config, 2)),
            "alone": [config],
        }
        found.append(
            sum(
                math.sqrt(getattr(shares, name) / len(keys)) * normal(seed, kernel, name, key)
                for name, keys in parts.items()
                for key in keys
            )
        )
    return np.array(found)


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's; equal values share the mean of their ranks."""
    return float(np.corrcoef(_ranks(a), _ranks(b))[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def truth(
    model: Mapping[Candidate, float], seed: int, correlation: float, shares: Shares = Shares()
) -> dict[Candidate, float]:
    """True seconds whose order has this rank correlation with the model's."""
    prior, error = np.log(np.array(list(model.values()))), errors(model, seed, shares)
    low, high = 0.0, 2.0
    for _ in range(20):
        middle = (low + high) / 2
        if rank_correlation(prior, prior + middle * error) > correlation:
            low = middle
        else:
            high = middle
    return dict(zip(model, np.exp(prior + low * error).tolist(), strict=True))


# ---- kernels that are not there -------------------------------------------------------------

GEMM_CHOICES = {
    "block_m": (16, 32, 64, 128),
    "block_n": (64, 128, 256),
    "warps": (4, 8),
    "stages": (2, 3, 4, 5),
    "split_k": (1, 2, 4, 8, 16),
}
GEMV_CHOICES = {"block_n": (8, 16, 32, 64), "warps": (2, 4, 8), "split_k": (1, 2, 4)}
_BLOCK_K, _BYTES = 128, 0.515  # of a weight: 4 bits and a scale for 128


def _configs(choices: Mapping[str, tuple[int, ...]], most_m: int) -> tuple[Config, ...]:
    found = (tuple(zip(choices, values, strict=True)) for values in product(*choices.values()))
    return tuple(config for config in found if dict(config).get("block_m", 16) <= most_m)


def _gemm_configs(problem: Problem) -> tuple[Config, ...]:
    return _configs(GEMM_CHOICES, max(32, 2 * problem.m_bucket))


def _gemm_seconds(problem: Problem, config: Config, compiled: Compiled | None = None) -> float:
    """Of 4-bit weights, dequantised in registers."""
    assert problem.machine is not None
    choice = dict(config)
    m, n, k, splits = problem.m_bucket, problem.n, problem.k, choice["split_k"]
    block_m, block_n = choice.get("block_m", 16), choice["block_n"]
    rows, columns = math.ceil(m / block_m), math.ceil(n / block_n)
    partials = 0 if splits == 1 else 8 * m * n * splits
    stage = block_n * _BLOCK_K // 2 + block_m * _BLOCK_K * 2
    stages, threads = choice.get("stages", 4), 32 * choice["warps"]
    work = Work(
        bytes=n * k * _BYTES + 0.2 * columns * m * k + 2 * m * n + partials,
        ops=2 * rows * block_m * n * k,
        kind="bf16",
        alu=2.7 * n * k * rows,
        extra_seconds=0.0 if splits == 1 else 2e-6,
    )
    tiling = Tiling(
        blocks=rows * columns * splits,
        threads=threads,
        in_flight_bytes=(stages - 1) * stage,
        registers=min(255, 40 + block_m * block_n // threads),
        smem_bytes=stages * stage,
    )
    return launch_seconds(work, tiling, problem.machine, compiled)


def kernel(
    name: str,
    configs: Callable[[Problem], tuple[Config, ...]],
    compile_config: Compile | None = None,
    refuse: Callable[[Problem], tuple[Reason, ...]] = lambda problem: (),
) -> Kernel:
    """A kernel that can be ranked and compiled, not launched."""
    return Kernel(
        name=name,
        refuse=refuse,
        prepare=lambda packed, dtype: packed,
        launch=lambda x, layout, config: x,
        seconds=_gemm_seconds,
        configs=configs,
        compile=compile_config,
        source=f"source of {name}",
    )


def _few_rows(problem: Problem) -> tuple[Reason, ...]:
    if problem.m_bucket <= 4:
        return ()
    return (Reason("SHAPE_M", f"needs M <= 4, got {problem.m_bucket}", "use sim_gemm"),)


KERNELS = (
    kernel("sim_gemm", _gemm_configs),
    kernel("sim_gemv", lambda problem: _configs(GEMV_CHOICES, 16), refuse=_few_rows),
)


# ---- the device -----------------------------------------------------------------------------


class SimulatedDevice:
    """A `Timer` of one problem, or of several: then `of` answers the true seconds of each."""

    def __init__(
        self,
        true_seconds: Mapping[Candidate, float],
        seed: int,
        of: Callable[[AnyProblem], Mapping[Candidate, float]] | None = None,
    ) -> None:
        self.true_seconds = dict(true_seconds)
        self.clock = 0.0
        self.closed = False
        self.verified: set[tuple[str, Candidate]] = set()
        self.n_samples = 0
        self._seed = seed
        self._of = of or (lambda problem: self.true_seconds)
        self._draw = random.Random(seed)

    def fate(self, candidate: Candidate) -> tuple[str, str] | None:
        """(why, when) of a candidate that faults: when is "verify" or "sample"."""
        at = random.Random(f"{self._seed} {candidate}").random()
        when = "verify" if int(at * 1e6) % 2 else "sample"
        for why, share in (("DEATH", DEATHS), ("TIMEOUT", HANGS), ("WRONG", WRONG)):
            if at < share:
                return why, "verify" if why == "WRONG" else when
            at -= share
        return None

    def best(self) -> float:
        """True seconds of the best that does not fault."""
        return min(t for candidate, t in self.true_seconds.items() if not self.fate(candidate))

    def verify(self, problem: AnyProblem, candidate: Candidate) -> float:
        """As `Timer.verify`."""
        self.clock += VERIFY_SECONDS
        self._run(candidate, "verify")
        self.verified.add((str(problem), candidate))
        return 1e-3

    def sample(
        self, problem: AnyProblem, candidates: Sequence[Candidate], n: int
    ) -> list[list[float] | Fault]:
        """As `Timer.sample`; a candidate that was not verified is an error of the tuner."""
        found: dict[Candidate, list[float] | Fault] = {}
        for candidate in candidates:
            assert (str(problem), candidate) in self.verified, f"{candidate} was not verified"
            try:
                self._run(candidate, "sample")
                found[candidate] = []
            except Fault as fault:
                found[candidate] = fault
        true_seconds = self._of(problem)
        live = [candidate for candidate in candidates if not isinstance(found[candidate], Fault)]
        for _ in range(n):
            for candidate in self._draw.sample(live, len(live)):
                taken = found[candidate]
                assert isinstance(taken, list), "of a live candidate"
                taken.append(self._seconds(candidate, true_seconds[candidate]))
        return [found[candidate] for candidate in candidates]

    def close(self) -> None:
        """As `Timer.close`."""
        self.closed = True

    def _run(self, candidate: Candidate, when: str) -> None:
        fate = self.fate(candidate)
        if fate is None or fate[1] != when:
            return
        why = fate[0]
        self.clock += {"TIMEOUT": HANG_SECONDS + RESTART_SECONDS, "DEATH": RESTART_SECONDS}.get(
            why, 0
        )
        raise Fault(candidate, why, "simulated")

    def _seconds(self, candidate: Candidate, true_seconds: float) -> float:
        spread = random.Random(f"noise {candidate}").uniform(0.01, 0.03)
        noise = math.exp(spread * self._draw.gauss())
        if self._draw.random() < OUTLIERS:
            noise *= self._draw.uniform(2, 10)
        drift = 1 + DRIFT * math.sin(2 * math.pi * self.clock / DRIFT_SECONDS)
        seconds = true_seconds * noise * drift
        self.clock += CALLS * seconds
        self.n_samples += 1
        return seconds
