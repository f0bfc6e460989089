"""Faults: what they say, and that they survive the way between processes."""

import pickle

import pytest

from fewbit.quant.errors import FewbitError
from fewbit.quant.timing import FAULTS, Candidate, Fault

CANDIDATE = Candidate("gemm_w4a16", (("block_m", 16),))


@pytest.mark.parametrize("why", FAULTS)
def test_a_fault_says_who_and_why(why):
    fault = Fault(CANDIDATE, why, "nothing heard for 2.0 s")
    assert str(fault) == f"gemm_w4a16 {{block_m 16}}: {why} nothing heard for 2.0 s"
    assert isinstance(fault, FewbitError)
    again = pickle.loads(pickle.dumps(fault))
    assert (again.candidate, again.why, again.text) == (CANDIDATE, why, "nothing heard for 2.0 s")
    assert str(again) == str(fault)


def test_there_are_no_other_faults():
    with pytest.raises(ValueError, match="must be one of TIMEOUT, FAULT, DEATH, WRONG, got 'LATE'"):
        Fault(CANDIDATE, "LATE", "")
