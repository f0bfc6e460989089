"""How far a cost model is off for configs that were not timed, learned from those that were.

    e(c) = log(measured / modelled seconds) of candidate c, taken as a Gaussian process:

    cov(e(c), e(c')) = O²                                    the model is off for all alike
                     + [same kernel] · (P² + S²·(1 − F)·exp(−H(c, c') / 3))
                     + [c = c']      · S²·F                  what only this config has
    observed         + [c = c']      · (2 %)²                noise of a median

H is the number of choices in which two configs of a kernel differ: what a tile size or a number of
stages costs is mostly the same whatever the other choices are, which makes errors predictable. Size S
and share F are those of a small grid that make the observations most likely; O and P are guesses, wide
enough not to matter.

`expected_gain` is the expected improvement of log seconds over the best one measured: it is large
where a candidate is promising, and where little is known of it.

Deliberately not here: timing, and the choice of what comes first.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .ladder import Candidate

_OFFSET, _PER_KERNEL, _NOISE = 0.3, 0.2, 0.02  # standard deviations of log seconds
_SIZES = (0.05, 0.1, 0.2, 0.4)  # of S
_SHARES = (0.2, 0.6)  # of F
_REACH = 3.0  # choices that may differ until two errors have little in common
_LEAST_VARIANCE = 1e-8

Array = NDArray[np.floating]
Seconds = Mapping[Candidate, float]


def expected_gain(model: Seconds, measured: Seconds) -> dict[Candidate, float]:
    """Expected improvement of log seconds, of every candidate of `model` that was not measured.
    At least one was."""
    errors = {c: math.log(seconds / model[c]) for c, seconds in measured.items()}
    rest = [candidate for candidate in model if candidate not in measured]
    error, deviation = _posterior(rest, errors)
    expected = np.log([model[candidate] for candidate in rest]) + error
    lead = math.log(min(measured.values())) - expected
    gain = deviation * _improvement(lead / deviation)
    return dict(zip(rest, gain.tolist(), strict=True))


@dataclass(frozen=True)
class _Fit:
    """Of one (S, F): how likely the observations are, and the factor [seen, seen] of their covariance
    with the errors divided by it."""

    size: float
    share: float
    likelihood: float
    factor: Array
    white: Array


def _posterior(
    candidates: Sequence[Candidate], errors: Mapping[Candidate, float]
) -> tuple[Array, Array]:
    """(mean, standard deviation) [n] of the candidates' errors."""
    seen, error = list(errors), np.array(list(errors.values()))
    alike = _alike(seen, seen)
    fits = [_fit(alike, error, size, share) for size in _SIZES for share in _SHARES]
    best = max(fits, key=lambda fit: fit.likelihood)
    cross = _covariance(_alike(candidates, seen), best.size, best.share)
    same = {candidate: column for column, candidate in enumerate(seen)}
    for row, candidate in enumerate(candidates):
        if candidate in same:
            cross[row, same[candidate]] += best.size**2 * best.share
    reach = np.linalg.solve(best.factor, cross.T)
    total = _OFFSET**2 + _PER_KERNEL**2 + best.size**2
    variance = total - (reach * reach).sum(0)
    return reach.T @ best.white, np.sqrt(np.maximum(variance, _LEAST_VARIANCE))


def _alike(rows: Sequence[Candidate], columns: Sequence[Candidate]) -> Array:
    """exp(−H / reach) of each pair [rows, columns]; 0 across kernels."""
    alike = np.zeros((len(rows), len(columns)))
    for kernel in {candidate.kernel for candidate in columns}:
        i = [at for at, candidate in enumerate(rows) if candidate.kernel == kernel]
        j = [at for at, candidate in enumerate(columns) if candidate.kernel == kernel]
        if not i:
            continue
        a, b = _values([rows[at] for at in i]), _values([columns[at] for at in j])
        differ = (a[:, None, :] != b[None, :, :]).sum(-1)
        alike[np.ix_(i, j)] = np.exp(-differ / _REACH)
    return alike


def _values(candidates: Sequence[Candidate]) -> NDArray[np.int_]:
    """Choices [n, choices] of candidates of one kernel."""
    values = [[value for _, value in candidate.config] for candidate in candidates]
    return np.array(values, dtype=np.int_).reshape(len(values), len(values[0]))


def _covariance(alike: Array, size: float, share: float) -> Array:
    """Of errors, without what only one config has."""
    shared: Array = _OFFSET**2 + (alike > 0) * _PER_KERNEL**2 + size**2 * (1 - share) * alike
    return shared


def _fit(alike: Array, error: Array, size: float, share: float) -> _Fit:
    alone = (size**2 * share + _NOISE**2) * np.eye(len(error))
    factor = np.linalg.cholesky(_covariance(alike, size, share) + alone)
    white = np.linalg.solve(factor, error)
    likelihood = -0.5 * float(white @ white) - float(np.log(factor.diagonal()).sum())
    return _Fit(size, share, likelihood, factor, white)


def _improvement(z: Array) -> Array:
    """E[max(z − u, 0)] of a standard normal u."""
    erf = np.array([math.erf(value / math.sqrt(2)) for value in z])
    improvement: Array = z * (1 + erf) / 2 + np.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    return improvement
