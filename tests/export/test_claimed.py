"""Claims on output folders: the same export goes on, everything else is refused."""

import pytest

from fewbit.export.claimed import claimed
from fewbit.export.journal import JOURNAL
from fewbit.quant.errors import CheckpointError


def test_a_claim_holds_until_the_end(tmp_path):
    out = tmp_path / "a" / "out"
    with pytest.raises(KeyboardInterrupt), claimed(out, {"from": "a"}) as journal:
        journal.append({"event": "file", "name": "x"})
        raise KeyboardInterrupt
    assert (out / JOURNAL).is_file()
    with (
        pytest.raises(CheckpointError, match=r"unfinished run of something else"),
        claimed(out, {"from": "b"}),
    ):
        pass
    with claimed(out, {"from": "a"}) as journal:
        assert [event["event"] for event in journal.events] == ["run", "file"]
        with (
            pytest.raises(CheckpointError, match=r"another fewbit process is writing here"),
            claimed(out, {"from": "a"}),
        ):
            pass
    assert not (out / JOURNAL).exists()


def test_folders_of_others_are_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match=r"exists and is not empty"), claimed(tmp_path, {}):
        pass
    with pytest.raises(CheckpointError, match=r"is a file"), claimed(tmp_path / "file", {}):
        pass
    assert (tmp_path / "file").read_text() == "mine"
