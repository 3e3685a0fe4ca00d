"""Stopping on request: Ctrl-C, SIGTERM from a scheduler, the stop button of a notebook."""

import contextlib
import os
import signal
import threading
from types import FrameType

from lm.parallel import distributed


class Stopper:
    """`with Stopper() as stopper:` turns the first SIGINT or SIGTERM into a flag that the loop
    checks between steps; a second one raises KeyboardInterrupt. Restores the previous handlers on
    exit.

    Interrupting a notebook cell is a SIGINT too. Outside the main thread Python delivers no
    signals; call `stop()` there.
    """

    def __init__(self) -> None:
        self.cause: str | None = None
        self._before: dict[signal.Signals, signal.Handlers] = {}

    def __enter__(self) -> "Stopper":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            # None: a handler that was not set from Python and cannot be restored.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before.clear()

    def stop(self, cause: str = "asked to stop") -> None:
        """Asks the loop to save and return after the current step."""
        self.cause = cause

    def asked(self, step: int) -> bool:
        """Whether to stop after `step`; the same on all processes (distributed.agree)."""
        return distributed.agree(self.cause is not None, step)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self.cause is not None:
            raise KeyboardInterrupt(f"{signal.Signals(number).name} after {self.cause}")
        self.cause = signal.Signals(number).name
        # print() is not reentrant, and a handler can run inside it; os.write() is safe.
        with contextlib.suppress(OSError):
            os.write(2, b"\nStopping after this step and saving. Interrupt again to stop now.\n")
