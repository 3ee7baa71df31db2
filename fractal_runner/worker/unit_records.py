"""What a worker's ledger says of a unit: that it starts, which process it is, how it has ended.

Apart from `command`, which runs units: here are only the words, which `aftermath` reads. Most units begin
and end alike, and for each of them something is written twice: texts for these are put together directly,
which takes a third of what encoding a mapping does.
"""

from __future__ import annotations

import json.encoder
import time
import zlib
from dataclasses import fields
from operator import attrgetter
from typing import Any

from fractal_runner.worker import processes
from fractal_runner.worker.jsontext import encoder
from fractal_runner.worker.spec import UnitResult, UnitSpec

_INLINE_OUTPUT_CHARS = 65_536
_RECORDED = tuple(field.name for field in fields(UnitResult) if field.name not in ("key", "digest", "output"))
_recorded_values = attrgetter(*_RECORDED)
_encode = encoder(separators=(",", ":"))
_quoted: Any = json.encoder.encode_basestring_ascii


def start_of(spec: UnitSpec) -> str:
    """The record of a unit that is about to start."""
    digest = f',"digest":{_quoted(spec.digest)}' if spec.digest else ""
    return f'{{"kind":"start","key":{_quoted(spec.key)},"time":{time.time()!r}{digest}}}'


def process_of(spec: UnitSpec, pid: int, since: int) -> str:
    """The record of the process that a unit's command runs in.

    Args:
        spec: the unit.
        pid: the process, on the host and since the boot that the ledger's first record names.
        since: clock ticks since boot, before it was started.
    """
    # That it started between two ticks of the clock tells it from any other process of this pid, and costs
    # no look at /proc.
    ticks = [since, processes.ticks_since_boot()]
    return _encode({"kind": "process", "key": spec.key, "pid": pid, "start_ticks": ticks})


def end_of(spec: UnitSpec, result: UnitResult, text: str | None) -> str:
    """The record of a unit's end: all that is known, but large output by file and checksum.

    Args:
        spec: the unit.
        result: what happened to it.
        text: what it left, as JSON text; None for nothing.
    """
    if text is None and _is_plain_success(result):
        peak = "" if result.peak_bytes is None else f'"peak_bytes":{result.peak_bytes:d},'
        return (
            f'{{"kind":"end","key":{_quoted(spec.key)},"result":{{"returncode":0,'
            f'"host":{_quoted(result.host)},"pid":{result.pid:d},"started":{result.started!r},'
            f'"ended":{result.ended!r},"cpu_s":{result.cpu_s!r},{peak}"start":{_quoted(result.start)}}}}}'
        )
    record = {
        name: value
        for name, value in zip(_RECORDED, _recorded_values(result), strict=True)
        if value is not None and value != "" and value is not False
    }
    if text is not None:
        if spec.command is not None and len(text) > _INLINE_OUTPUT_CHARS:
            checksum = zlib.crc32(text.encode())
            # The run's directory may have another path where this is read.
            file = spec.out_file.removeprefix(f"{spec.run_dir}/")
            record["output"] = {"file": file, "chars": len(text), "crc32": checksum}
        else:
            record["output"] = {"json": text}
    return _encode({"kind": "end", "key": spec.key, "result": record})


def _is_plain_success(result: UnitResult) -> bool:
    """Whether there is nothing to be said of a command but when and where it ran, and what it took."""
    return (
        result.returncode == 0
        and result.start is not None  # a command
        and result.cpu_s is not None
        and result.message is result.reason is result.signal is result.output_error is None
        and not (result.log_tail or result.why_cold or result.left_running)
    )
