"""One unit's log, read safely, and a stream on which several of them can be told apart.

Logs are opened anew each time they are looked at, as a network file system shows only then what another
host has written. What is in them is somebody else's: a terminal gets nothing that it would obey.
"""

from __future__ import annotations

import codecs
import io
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from sqlalchemy import Row

from fractal_runner.cli.wording import first_line, printable, unit_title
from fractal_runner.history.schema import State

_PART = 1 << 16


class Printer:
    """Prints the logs of several units to one stream.

    Args:
        stream: where to.
        is_terminal: whether control characters are to be kept from it.
        directory: the run's, as it was given.
    """

    def __init__(self, stream: TextIO, *, is_terminal: bool, directory: Path) -> None:
        self._stream = stream
        self._is_terminal = is_terminal
        self._directory = directory
        self._at_line_start = True
        self._last: object = None  # whose text it was

    def header(self, unit: Row[Any], task_name: str, note: str = "") -> None:
        """Say whose text follows, or why there is none."""
        title = unit_title(unit.position, task_name, unit.stage, unit.number)
        image = f" ({first_line(unit.zarr_url)})" if unit.zarr_url else ""
        log = first_line(str(self._directory / unit.log)) if unit.log else "no log is recorded"
        note = f" ({note})" if note and unit.log else ""
        self._end_line()
        start = f", started {unit.start}" if unit.start else ""
        state = f"{unit.state}{start}, attempt {unit.attempt}"
        self._stream.write(f"==> {title}{image}, {state}: {log}{note} <==\n")

    def text(self, text: str) -> None:
        """Print a part of a log."""
        if text:
            self._stream.write(printable(text) if self._is_terminal else text)
            self._at_line_start = text.endswith("\n")

    def flush(self) -> None:
        self._stream.flush()

    def end(self) -> None:
        """Leave the cursor where the next command begins."""
        if self._is_terminal:
            self._end_line()
        self.flush()

    def _end_line(self) -> None:
        if not self._at_line_start:
            self._stream.write("\n")
            self._at_line_start = True

    def decoder(self) -> Any:
        """Turns a log's bytes into text, part by part."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        # On a terminal a carriage return, with which progress bars begin anew, begins a line.
        return io.IncrementalNewlineDecoder(decoder, translate=True) if self._is_terminal else decoder


class LogReader:
    """One attempt's log, read on from where it was left.

    Args:
        root: the run's directory, resolved: nothing outside of it is opened.
        unit: the attempt.
        decoder: turns bytes into text.

    Attributes:
        unit: the attempt, as it was last seen.
        problem: why nothing can be read; "" if something can.
    """

    def __init__(self, root: Path, unit: Row[Any], decoder: Any) -> None:
        self.unit = unit
        self._root = root
        self._decoder = decoder
        self._offset = 0
        self.problem = ""

    def parts(self) -> Iterator[str]:
        """What has been added since the last time."""
        fd = self._open()
        if fd is None:
            return
        with os.fdopen(fd, "rb") as file:
            size = os.fstat(fd).st_size  # and no further: a unit may write as fast as this can read
            file.seek(self._offset)
            while part := file.read(min(_PART, max(0, size - self._offset))):
                self._offset += len(part)
                yield self._decoder.decode(part)

    def rest(self) -> str:
        """What was held back, as more could have followed."""
        text: str = self._decoder.decode(b"", True)
        return text

    def _open(self) -> int | None:
        self.problem = ""
        if self.unit.log is None:
            self.problem = "no log is recorded"
            return None
        try:
            path = Path(os.path.realpath(self._root / self.unit.log))
            if not path.is_relative_to(self._root):
                self.problem = "its path leads out of the run's directory: it is not opened"
                return None
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except FileNotFoundError:
            self.problem = self._why_missing()
            return None
        except (OSError, ValueError) as error:
            self.problem = f"it cannot be read: {getattr(error, 'strerror', None) or error}"
            return None
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            self.problem = "it is not a file"
            return None
        return fd

    def _why_missing(self) -> str:
        if self.unit.started is None:
            return "there is no log: it has not started"
        if self.unit.state == State.RUNNING:
            return "there is no log yet"
        return "there is no log: it was removed, or its Python function wrote none"
