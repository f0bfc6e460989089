"""Named errors: one root, and a suggestion that is near or absent."""

import pytest

from fewbit.quant import errors
from fewbit.quant.errors import FewbitError, nearest_name


def test_every_error_has_the_one_root():
    kinds = [kind for name, kind in vars(errors).items() if name.endswith("Error")]
    assert len(kinds) > 4
    assert all(issubclass(kind, FewbitError) for kind in kinds)
    assert not issubclass(FewbitError, (OSError, ValueError))  # never caught by accident


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("dampnig", " (did you mean 'damping'?)"),
        ("sweep", " (did you mean 'sweeps'?)"),
        ("zzz", ""),
        ("", ""),
    ],
)
def test_nearest_name(name, expected):
    assert nearest_name(name, iter(["damping", "sweeps", "retries"])) == expected
