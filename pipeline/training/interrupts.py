"""Ctrl-C and SIGTERM: the first asks a run to stop behind the batch in progress, the second stops at once."""

import os
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any, Self

SIGNALS = (signal.SIGINT, signal.SIGTERM)
INTERRUPTED = 130
_SHOW_CURSOR = "\x1b[?25h"


class Interrupts:
    """Catches the signals while the context lasts; does nothing outside the main thread.

    Python runs a signal's handler only between two of its instructions, and a step of a model may be one of
    them. So a thread reads the signals from a pipe, where they arrive at once, and ends the process at the
    second one. Nothing is lost: what is on disk appeared whole.
    """

    def __init__(self) -> None:
        self.asked = False
        self._handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._reader, self._writer = os.pipe()
            os.set_blocking(self._writer, False)
            self._outer = signal.set_wakeup_fd(self._writer)
            self._handlers = {number: signal.signal(number, self._ask) for number in SIGNALS}
            self._thread = threading.Thread(target=self._watch, name="interrupts", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._handlers:
            return
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._outer)
        os.close(self._writer)
        self._thread.join()
        os.close(self._reader)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True

    def _watch(self) -> None:
        count = 0
        while byte := os.read(self._reader, 1):
            count += byte[0] in SIGNALS
            if count == 2:
                cursor = _SHOW_CURSOR if sys.stderr.isatty() else ""
                print(f"{cursor}stopped at once", file=sys.stderr, flush=True)
                os._exit(INTERRUPTED)
