"""What takes its time at a scheduler, done in threads beside the manager's.

One of them submits, another one asks and cancels: a submission that hangs keeps nobody from asking. What an
errand returns, or what becomes of it, is a note for the manager's thread, which does it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue

Note = Callable[[], None]
_Queue = SimpleQueue[Callable[[], None] | None]


class Errands:
    """The manager's thread owns it.

    Args:
        name: of the threads.
        note: leaves something to be done by the manager's thread.

    Attributes:
        submitting: how many submissions are under way.
        asking: whether something is being asked.
        matters: whether what is being asked has to be known before all is done.
    """

    def __init__(self, name: str, note: Callable[[Note], None]) -> None:
        self._name = name
        self._note = note
        # Not a pool of the standard library's: those take nothing any more once the interpreter is about to
        # end, which is when most of the waiting for jobs is done.
        self._threads: dict[str, tuple[threading.Thread, _Queue]] = {}
        self.submitting = 0
        self.asking = self.matters = False

    def submit(self, errand: Callable[[], Note], failed: Callable[[Exception], None]) -> None:
        """Have something submitted, after what is being submitted."""
        self.submitting += 1
        self._send("submits", errand, failed, self._submitted)

    def ask(
        self, errand: Callable[[], Note], failed: Callable[[Exception], None], *, matters: bool = True
    ) -> None:
        """Have something asked; one question at a time."""
        self.asking, self.matters = True, matters
        self._send("asks", errand, failed, self._asked)

    @property
    def is_idle(self) -> bool:
        return not self.submitting and not (self.asking and self.matters)

    def release(self) -> list[threading.Thread]:
        """Let go of the threads, which end by themselves; there are new ones for what comes later."""
        threads, self._threads = self._threads, {}
        for _, queue in threads.values():
            queue.put(None)
        return [thread for thread, _ in threads.values()]

    def _send(
        self, kind: str, errand: Callable[[], Note], failed: Callable[[Exception], None], over: Note
    ) -> None:
        def run() -> None:
            try:
                answer = errand()
            except Exception as error:  # whatever it is: the manager decides
                failure = error

                def answer() -> None:
                    failed(failure)

            def conclude() -> None:
                over()
                answer()

            self._note(conclude)

        if kind not in self._threads:
            queue: _Queue = SimpleQueue()
            thread = threading.Thread(target=_serve, args=(queue,), name=f"{self._name}-{kind}", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:  # there are too many: what else is to be done goes on
                refusal = error

                def refuse() -> None:
                    over()
                    failed(refusal)

                self._note(refuse)
                return
            self._threads[kind] = thread, queue
        self._threads[kind][1].put(run)

    def _submitted(self) -> None:
        self.submitting -= 1

    def _asked(self) -> None:
        self.asking = False


def _serve(queue: _Queue) -> None:
    while (errand := queue.get()) is not None:
        errand()
        del errand  # and what it refers to, until the next one comes
