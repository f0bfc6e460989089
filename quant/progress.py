"""A live bar on a terminal, plain lines otherwise: unit, bits so far, worst error, time left."""

import sys
from types import TracebackType

from tqdm import tqdm

from .pipeline import Progress


class ProgressBar:
    """Shows `Progress` records on stderr; silent if `quiet`."""

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        self._live = sys.stderr.isatty()
        self._bar: tqdm[None] | None = None

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def say(self, line: str) -> None:
        """One line of text above the bar."""
        if not self._quiet:
            tqdm.write(line, file=sys.stderr)

    def show(self, state: Progress) -> None:
        """Take the next state."""
        if self._quiet:
            return
        facts = f"{state.bits_per_weight:.2f} bits"
        if state.worst is not None:
            facts += f", worst {state.worst[1]:.4f} {state.worst[0]}"
        if not self._live:
            if state.seconds_left is not None:
                facts += f", {state.seconds_left:.0f} s left"
            self.say(f"[{state.done}/{state.total}] {state.unit}: {facts}")
            return
        if self._bar is None:
            self._bar = tqdm(total=state.total, initial=state.done - 1, file=sys.stderr)
        self._bar.set_description_str(state.unit)
        self._bar.set_postfix_str(facts)
        self._bar.update(state.done - self._bar.n)
