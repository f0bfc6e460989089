"""What is learned of a cost model's errors, against closed forms and by what it predicts."""

import math
from itertools import product

import numpy as np
import pytest

from fewbit.quant import model_error
from fewbit.quant.ladder import Candidate
from fewbit.quant.model_error import expected_gain

A = tuple(Candidate("a", (("x", x), ("y", y))) for x, y in product(range(5), range(5)))
B = tuple(Candidate("b", (("z", z),)) for z in range(4))
PLAIN = Candidate("plain")


def test_what_was_measured_is_not_asked_again() -> None:
    model = dict.fromkeys((*A, *B, PLAIN), 1e-5)
    gain = expected_gain(model, {A[0]: 1e-5, PLAIN: 2e-5})
    assert gain.keys() == model.keys() - {A[0], PLAIN}
    assert all(value >= 0 and math.isfinite(value) for value in gain.values())


def test_a_slow_choice_is_avoided_wherever_it_occurs() -> None:
    """x = 0 takes 40 % more than the model says: rest of its row is worth less than that of others."""
    model = dict.fromkeys(A, 1e-5)
    measured = {c: 1.4e-5 if dict(c.config)["x"] == 0 else 1e-5 for c in A[::3]}
    gain = expected_gain(model, measured)
    slow = [value for c, value in gain.items() if dict(c.config)["x"] == 0]
    fast = [value for c, value in gain.items() if dict(c.config)["x"] != 0]
    assert max(slow) < min(fast)


def test_a_kernel_that_the_model_flatters_loses_its_place() -> None:
    model = dict.fromkeys(A, 1e-5) | dict.fromkeys(B, 1.2e-5)
    measured = {**dict.fromkeys(A[:10:2], 2e-5), B[0]: 1.2e-5}
    gain = expected_gain(model, measured)
    assert min(gain[c] for c in B[1:]) > max(gain[c] for c in A if c in gain)


def test_a_common_factor_changes_nothing_between_kernels() -> None:
    """The model's unit is learned: where all is twice as slow, the order of what is left stays."""
    model = {c: 1e-5 * (1 + i / 10) for i, c in enumerate(A)}
    true = expected_gain(model, {c: model[c] for c in A[:8]})
    twice = expected_gain(model, {c: 2 * model[c] for c in A[:8]})
    assert sorted(true, key=lambda c: -true[c])[:5] == sorted(twice, key=lambda c: -twice[c])[:5]


@pytest.mark.parametrize("z", [-3.0, -0.5, 0.0, 1.0, 4.0])
def test_expected_improvement_is_the_integral(z: float) -> None:
    u = np.linspace(-9, 9, 200_001)
    density = np.exp(-u * u / 2) / math.sqrt(2 * math.pi)
    expected = (np.maximum(z - u, 0) * density).sum() * (u[1] - u[0])
    assert model_error._improvement(np.array([z]))[0] == pytest.approx(expected, abs=1e-6)


def test_the_posterior_is_that_of_all_at_once() -> None:
    """Mean and deviation from the covariance of everything, conditioned by a plain solve."""
    errors = {A[0]: 0.1, A[7]: -0.2, B[1]: 0.05}
    seen = list(errors)
    mean, deviation = model_error._posterior([A[1], A[7], B[2], PLAIN], errors)
    best = max(
        (
            model_error._fit(model_error._alike(seen, seen), np.array(list(errors.values())), s, f)
            for s in model_error._SIZES
            for f in model_error._SHARES
        ),
        key=lambda fit: fit.likelihood,
    )
    every = [A[1], A[7], B[2], PLAIN, A[0], B[1]]
    alike = np.array([[covariance(a, b, best.size, best.share) for b in every] for a in every])
    at = [every.index(c) for c in seen]
    observed = alike[np.ix_(at, at)] + model_error._NOISE**2 * np.eye(3)
    gain = np.linalg.solve(observed, alike[at]).T
    assert np.allclose(mean, (gain @ list(errors.values()))[:4])
    variance = alike.diagonal() - (gain * alike[:, at]).sum(1)
    assert np.allclose(deviation, np.sqrt(np.maximum(variance[:4], 1e-8)))


def covariance(a: Candidate, b: Candidate, size: float, share: float) -> float:
    found = model_error._OFFSET**2
    if a.kernel == b.kernel:
        differ = sum(x != y for x, y in zip(a.config, b.config, strict=True))
        found += model_error._PER_KERNEL**2 + size**2 * (1 - share) * math.exp(-differ / 3)
    return found + (a == b) * size**2 * share


def test_many_candidates_take_milliseconds() -> None:
    big = [Candidate("a", (("x", x), ("y", y))) for x in range(25) for y in range(20)]
    model = {c: 1e-5 * (1 + i / 500) for i, c in enumerate(big)}
    gain = expected_gain(model, {c: 1.1 * model[c] for c in big[:75]})
    assert len(gain) == 425
