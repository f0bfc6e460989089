"""An output folder that one export may fill: empty, or left by an interrupted export of the same.

The journal in it (`journal.py`) says what is being written and locks the folder against another
process; while it is there, nothing takes the folder for a checkpoint.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from ..quant.errors import CheckpointError
from .journal import JOURNAL, Journal, named_os_errors, sync_folder


@contextmanager
def claimed(out: Path, identity: Mapping[str, Any]) -> Iterator[Journal]:
    """The locked journal of `out`; without an error inside, the journal is removed in the end.

    identity: of what is written, contents included; JSON. CheckpointError if the folder holds
    anything else.
    """
    path = out / JOURNAL
    if os.path.lexists(out) and not out.is_dir():
        raise CheckpointError(f"{out} is a file; the output must be a folder")
    with named_os_errors(out):
        if out.is_dir() and not path.is_file() and any(out.iterdir()):
            raise CheckpointError(f"{out} exists and is not empty; choose another output folder")
        out.mkdir(parents=True, exist_ok=True)
    with closing(Journal(path)) as journal:
        with named_os_errors(out):
            journal.open()
            if not journal.events:
                journal.append({"event": "run", "identity": dict(identity)})
        if journal.events[0].get("identity") != identity:
            raise CheckpointError(
                f"{out} holds an unfinished run of something else; finish that one, or choose "
                f"another output folder"
            )
        with named_os_errors(out):
            yield journal
            path.unlink()
            sync_folder(out)
