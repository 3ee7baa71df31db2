"""The functions of calls that are measured, apart: whoever runs one imports its module."""

from __future__ import annotations

import os
import threading
import time


def nothing(number: int) -> int:
    """Do nothing."""
    return number


def tenth(number: int) -> int:
    """Take a tenth of a second, and no CPU."""
    time.sleep(0.1)  # this is the work
    return number


def place(number: int) -> tuple[int, int]:
    """Where calls run: process and thread. For as long as it takes another slot to begin one, too."""
    time.sleep(0.3)  # the slot is not to take another call meanwhile
    return os.getpid(), threading.get_ident()
