"""What takes its time at a scheduler, done in threads beside the manager's.

One of them submits, another one asks and cancels: a submission that hangs keeps nobody from asking. What an
errand returns, or what becomes of it, is a note for the manager's thread, which does it.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

Note = Callable[[], None]


class Errands:
    """The manager's thread owns it.

    Args:
        name: of the threads.
        note: leaves something to be done by the manager's thread.

    Attributes:
        submitting: how many submissions are under way.
        asking: whether something is being asked.
    """

    def __init__(self, name: str, note: Callable[[Note], None]) -> None:
        self._name = name
        self._note = note
        self._pools: dict[str, ThreadPoolExecutor] = {}
        self.submitting = 0
        self.asking = False

    def submit(self, errand: Callable[[], Note], failed: Callable[[Exception], None]) -> None:
        """Have something submitted, after what is being submitted."""
        self.submitting += 1
        self._send("submits", errand, failed, self._submitted)

    def ask(self, errand: Callable[[], Note], failed: Callable[[Exception], None]) -> None:
        """Have something asked; one question at a time."""
        self.asking = True
        self._send("asks", errand, failed, self._asked)

    @property
    def is_idle(self) -> bool:
        return not self.submitting and not self.asking

    def close(self) -> None:
        pools, self._pools = self._pools, {}
        for pool in pools.values():
            pool.shutdown(wait=True)

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

        if kind not in self._pools:
            self._pools[kind] = ThreadPoolExecutor(1, thread_name_prefix=f"{self._name}-{kind}")
        self._pools[kind].submit(run)

    def _submitted(self) -> None:
        self.submitting -= 1

    def _asked(self) -> None:
        self.asking = False
