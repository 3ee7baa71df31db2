"""What a worker does with one unit: files, processes, evidence, and what it reports."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import shlex
import signal
import subprocess
import sys
import zlib
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fractal_runner import quantities
from fractal_runner.errors import JobExecutionError
from fractal_runner.worker import processes
from fractal_runner.worker.command import log_tail, run_unit
from fractal_runner.worker.evidence import CorruptEvidenceError, frame, payloads, read_ledger
from fractal_runner.worker.spec import LAUNCH_FAILED, UnitSpec

Make = Callable[..., UnitSpec]


def records(spec: UnitSpec) -> list[dict[str, Any]]:
    [path] = Path(spec.run_dir, "evidence").iterdir()
    return list(read_ledger(path))


def test_a_command_gets_its_files_environment_and_process_group(spec: Make) -> None:
    unit = spec(
        'cat; echo "$1 $2 $3 $4"; echo err >&2; echo $FRACTAL_CACHE_DIR; ps -o pgid= -p $$; echo $$',
        env=(("FRACTAL_CACHE_DIR", "/cache"),),
    )

    result = run_unit(unit)

    assert result.succeeded
    lines = Path(unit.log_file).read_text().split("\n")
    assert lines[0] == f"--args-json {unit.args_file} --out-json {unit.out_file}"
    assert lines[1:3] == ["err", "/cache"]
    assert lines[3].strip() == lines[4] == str(result.pid)
    assert json.loads(Path(unit.args_file).read_text()) == {"zarr_url": "/z/1"}
    assert result.started is not None and result.ended is not None and result.started <= result.ended
    assert result.cpu_s is not None


@pytest.mark.parametrize("code", [1, 3, 137, 255])
def test_a_positive_exit_code_is_the_tasks(spec: Make, code: int) -> None:
    result = run_unit(spec(f"echo said; exit {code}"))

    assert (result.returncode, result.signal, result.log_tail) == (code, None, "said")


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGKILL, signal.SIGSEGV, signal.SIGINT, signal.SIGPIPE]
)
def test_a_signal_is_a_negative_code_with_its_name(spec: Make, number: signal.Signals) -> None:
    result = run_unit(spec(f"kill -{int(number)} $$"))

    assert (result.returncode, result.signal) == (-number, number.name)


@pytest.mark.parametrize(
    ("written", "error"),
    [
        ('{"a": ', "is not valid JSON"),
        ('{"a": NaN}', "NaN is not a JSON value"),
        ('{"a": 1, "a": 2}', "the key 'a' stands twice"),
        ("\udcff".encode("utf-8", "surrogateescape"), "is not valid JSON"),
    ],
)
def test_output_that_is_not_json_is_told(spec: Make, tmp_path: Path, written: Any, error: str) -> None:
    source = tmp_path / "source"
    source.write_bytes(written if isinstance(written, bytes) else written.encode())

    result = run_unit(spec(f'cp {source} "$4"'))

    assert result.returncode == 0
    assert not result.succeeded
    assert error in str(result.output_error)


@pytest.mark.parametrize("make", ['mkfifo "$4"', 'mkdir "$4"'])
def test_what_is_not_a_file_is_not_waited_for(spec: Make, make: str) -> None:
    result = run_unit(spec(make))

    assert result.output_error is not None


def test_an_out_file_of_an_earlier_try_is_removed_first(spec: Make) -> None:
    unit = spec('test ! -e "$4" && echo null > "$4"')
    Path(unit.out_file).write_text("{}")

    assert run_unit(unit).succeeded


def test_an_out_file_is_removed_when_a_unit_is_executed_again_in_a_folder_that_was_new(spec: Make) -> None:
    unit = spec('test ! -e "$4" && echo null > "$4"', is_folder_new=True)

    assert run_unit(unit).succeeded
    assert run_unit(unit).succeeded


@pytest.mark.parametrize(
    ("content", "mode", "code", "why"),
    [
        (None, 0, 127, "No such file or directory"),
        (
            "#!/no/such/interpreter\n",
            0o755,
            127,
            "the interpreter that its first line (#!) names does not exist",
        ),
        ("just text", 0o755, 126, "neither a binary nor"),
        ("#!/bin/sh\n", 0o644, 126, "Permission denied"),
    ],
)
def test_a_program_that_cannot_be_executed_is_named(
    spec: Make, tmp_path: Path, *, content: str | None, mode: int, code: int, why: str
) -> None:
    program = tmp_path / "program"
    if content is not None:
        program.write_text(content)
        program.chmod(mode)

    result = run_unit(spec(command=(str(program),)))

    assert result.returncode == code
    assert f"'{program}' cannot be executed: " in str(result.message)
    assert why in str(result.message)


def test_files_that_cannot_be_written_are_no_fault_of_the_task(spec: Make, tmp_path: Path) -> None:
    result = run_unit(spec("true", folder=str(tmp_path / "not there")))

    assert (result.returncode, result.reason) == (None, LAUNCH_FAILED)
    assert "not there/par-000000-0000000-args.json" in str(result.message)


def test_the_peak_of_a_small_child_is_not_its_parents(spec: Make) -> None:
    unit = spec(command=("true",))
    code = (
        "import pickle, sys; block = b'x' * 500_000_000\n"
        "from fractal_runner.worker.command import run_unit\n"
        "print(run_unit(pickle.load(open(sys.argv[1], 'rb'))).peak_bytes)"
    )
    pickled = Path(unit.run_dir, "spec.pkl")
    pickled.write_bytes(pickle.dumps(unit))

    said = subprocess.run(
        [sys.executable, "-c", code, str(pickled)], capture_output=True, text=True, check=True, timeout=60
    ).stdout.strip()

    assert said == "None" or int(said) < 100_000_000


def test_the_peak_of_a_large_child_is_seen(spec: Make) -> None:
    script = "b = b'x' * 200_000_000; import time; time.sleep(0.6)"

    result = run_unit(spec(shlex.join([sys.executable, "-ISc", script])))

    assert result.peak_bytes is not None
    assert 190_000_000 < result.peak_bytes < 400_000_000


def test_what_a_command_leaves_running_is_ended_and_said(spec: Make, tmp_path: Path) -> None:
    unit = spec(f"sleep 1000 & echo $! > {tmp_path}/pid")

    result = run_unit(unit)

    assert result.succeeded
    assert not processes.is_running(int((tmp_path / "pid").read_text()))
    assert "ended 1 process(es) that the command left behind" in Path(unit.log_file).read_text()


def test_a_helper_that_ends_by_itself_is_not_mentioned(spec: Make) -> None:
    unit = spec("sleep 0.2 &")

    assert run_unit(unit).succeeded
    assert Path(unit.log_file).read_text() == ""


def test_start_process_and_end_are_recorded(spec: Make, tmp_path: Path) -> None:
    unit = spec(
        f'cut -d" " -f22 /proc/$$/stat > {tmp_path}/ticks; '
        f'sleep 0.1; cp -r {tmp_path}/evidence {tmp_path}/seen; echo "{{}}" > "$4"'
    )

    result = run_unit(unit)

    worker, start, process, end = records(unit)
    assert worker["pid"] == os.getpid()
    assert worker["start_ticks"] == processes.start_ticks(os.getpid())
    assert start["key"] == unit.key
    assert process["pid"] == result.pid
    first, last = process["start_ticks"]
    assert first <= int((tmp_path / "ticks").read_text()) <= last
    assert end["result"]["returncode"] == 0
    assert end["result"]["output"] == {"json": "{}\n"}
    [seen] = (tmp_path / "seen").iterdir()
    assert [record["kind"] for record in read_ledger(seen)] == ["worker", "start", "process"]


def test_the_worker_says_for_whom_it_works_and_says_it_anew_for_the_next(spec: Make) -> None:
    host, pid = os.uname().nodename, os.getpid()
    unit = spec(function=lambda **_: None)

    run_unit(unit)
    run_unit(replace(unit, epoch=2))
    run_unit(replace(unit, epoch=2, coordinator=(host, 1)))
    run_unit(replace(unit, epoch=2, coordinator=("elsewhere", 7)))

    said = [record["coordinator"] for record in records(unit) if record["kind"] == "worker"]
    own = [host, pid, processes.start_ticks(pid)]
    assert said == [own, own, [host, 1, processes.start_ticks(1)], ["elsewhere", 7, None]]


def test_a_start_bears_the_digest_of_what_is_started(spec: Make) -> None:
    unit = spec("true", digest="abc")

    run_unit(unit)

    assert records(unit)[1]["digest"] == "abc"


@pytest.mark.parametrize("torn", [1, 30, 90_000])
def test_a_worker_takes_back_what_its_predecessor_was_writing_when_it_died(spec: Make, torn: int) -> None:
    unit = spec(function=lambda **_: None)
    run_unit(unit)
    [ledger] = Path(unit.run_dir, "evidence").iterdir()
    with ledger.open("ab") as file:
        file.write(frame(b"x" * 100_000)[:torn])

    run_unit(replace(unit, epoch=2))

    assert [record["kind"] for record in records(unit)] == ["worker", "start", "end"] * 2


@pytest.mark.parametrize(
    "shell",
    [
        "true",
        "exit 3",
        "kill -9 $$",
        'echo "{}" > "$4"',
        'echo "{" > "$4"',
        "python3 -c 'b = bytes(1 << 28)'",
    ],
)
def test_an_end_is_recorded_with_all_that_the_result_tells(spec: Make, shell: str) -> None:
    unit = spec(shell, digest="abc")

    result = run_unit(unit)

    recorded = records(unit)[-1]["result"]
    recorded.pop("output", None)
    told = {name: value for name, value in asdict(result).items() if value is not None and value is not False}
    assert recorded == {
        name: value for name, value in told.items() if value != "" and name not in ("key", "digest", "output")
    }


def test_large_output_is_recorded_by_its_checksum(spec: Make) -> None:
    unit = spec("""python3 -c 'print("[" + "1," * 50000 + "1]")' > "$4" """)

    result = run_unit(unit)

    assert len(result.output) == 50_001
    text = Path(unit.out_file).read_bytes()
    assert records(unit)[-1]["result"]["output"]["crc32"] == zlib.crc32(text)


def test_a_log_tail_is_whole_lines_of_at_most_20000_characters(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    log.write_text("".join(f"{n} é\n" for n in range(10_000)))

    tail = log_tail(str(log))

    assert 19_900 < len(tail) <= 20_000
    assert tail.splitlines()[-1] == "9999 é"
    assert tail.splitlines()[0].endswith(" é")
    assert log_tail(str(tmp_path / "no")) == ""


def test_functions_get_their_own_arguments_and_return_json(spec: Make) -> None:
    def change(*, zarr_url: str, more: dict[str, Any]) -> dict[str, Any]:
        more["seen"] = True
        return {"url": zarr_url}

    args: dict[str, Any] = {"zarr_url": "/z/1", "more": {}}

    result = run_unit(spec(function=change, args=args))

    assert result.output == {"url": "/z/1"}
    assert args["more"] == {}
    assert records(spec(function=change))[-1]["result"]["output"] == {"json": '{"url": "/z/1"}'}


@pytest.mark.parametrize(
    ("function", "code", "tail"),
    [
        (lambda **_: sys.exit(3), 3, "SystemExit: 3"),
        (lambda **_: sys.exit("words"), 1, "words"),
        (lambda **_: 1 / 0, 1, "ZeroDivisionError: division by zero"),
        ("no.such.module:f", 1, "No module named 'no'"),
        ("os.path:nothing", 1, "has no attribute 'nothing'"),
    ],
)
def test_what_a_function_raises_is_its_exit_code(spec: Make, function: Any, code: int, tail: str) -> None:
    unit = spec(function=function)

    result = run_unit(unit)

    assert result.returncode == code
    assert tail in result.log_tail
    assert tail in Path(unit.log_file).read_text()


def test_a_value_that_is_not_json_is_told(spec: Make) -> None:
    result = run_unit(spec(function=lambda **_: {"a": object()}))

    assert "is not JSON" in str(result.output_error)


def test_a_lambda_travels_in_a_spec(spec: Make) -> None:
    unit = pickle.loads(pickle.dumps(spec(function=lambda *, zarr_url: {"len": len(zarr_url)})))

    assert run_unit(unit).output == {"len": 4}
    assert run_unit(pickle.loads(pickle.dumps(unit))).output == {"len": 4}


def test_a_function_past_its_timeout_in_a_thread_is_left_running(spec: Make) -> None:
    import threading

    may_end = threading.Event()

    result = run_unit(spec(function=lambda **_: may_end.wait(60), timeout_s=0.1))

    may_end.set()
    assert (result.reason, result.left_running) == ("TIMEOUT", True)


def test_a_function_that_loops_in_another_process_is_stopped_by_an_exception(spec: Make) -> None:
    def loop(**_: Any) -> None:
        while True:
            pass

    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        result = pool.submit(run_unit, spec(function=loop, timeout_s=0.1)).result(60)
        assert pool.submit(len, "ab").result(60) == 2

    assert (result.reason, result.signal) == ("TIMEOUT", "SIGTERM")


@given(st.lists(st.binary(max_size=50), max_size=6), st.integers(0, 500))
def test_a_torn_record_is_one_that_is_not_there_yet(written: list[bytes], cut: int) -> None:
    data = b"".join(map(frame, written))

    read = list(payloads(data[: max(0, len(data) - cut)]))

    assert read == written[: len(read)]
    assert list(payloads(data)) == written


def test_a_flipped_byte_before_a_sound_record_is_corruption(tmp_path: Path) -> None:
    data = bytearray(frame(b'{"n": 1}') + frame(b'{"n": 2}'))
    data[30] ^= 1
    path = tmp_path / "ledger"
    path.write_bytes(data)

    with pytest.raises(CorruptEvidenceError, match=r"ledger: the record at byte 0 is damaged"):
        list(read_ledger(path))


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4GB", 4 * 10**9),
        ("4G", 4 * 10**9),
        (4000, 4 * 10**9),
        ("1.5G", 15 * 10**8),
        ("512MiB", 2**29),
        ("7B", 7),
    ],
)
def test_sizes(text: Any, size: int) -> None:
    assert quantities.parse_size(text) == size


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("01:30:00", 5400),
        ("90m", 5400),
        (45, 45),
        ("45", 45),
        ("2-12:00:00", 216000),
        ("12:30", 750),
        ("1h 30m", 5400),
    ],
)
def test_times(text: Any, seconds: float) -> None:
    assert quantities.parse_time(text) == seconds


@given(st.text(max_size=12) | st.floats() | st.integers() | st.booleans() | st.none())
def test_what_is_no_quantity_is_a_value_error(value: Any) -> None:
    for parse in (quantities.parse_size, quantities.parse_time):
        try:
            assert parse(value) > 0
        except ValueError as error:
            assert repr(value) in str(error)


def test_an_error_is_never_empty_and_assembles_its_files(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("the output")
    error = JobExecutionError(
        task_name="t",
        workflow_task_order=2,
        returncode=-9,
        reason="OUT_OF_MEMORY",
        stdout_file=str(tmp_path / "out"),
    )
    error.info = "the raw line"

    assert str(error) == "Task 't' (order 2) failed with exit code -9. Reason: OUT_OF_MEMORY. the raw line"
    assert str(JobExecutionError())
    assert "the output" in error.assemble_error()
    assert vars(pickle.loads(pickle.dumps(error))) == vars(error)


def test_a_worker_imports_the_standard_library_only() -> None:
    code = (
        "import sys, fractal_runner.worker.command\n"
        "print([name for name in ('pydantic', 'typer', 'rich', 'cloudpickle', 'psutil', 'yaml', 'asyncio', "
        "'sqlalchemy') if name in sys.modules])"
    )

    said = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )

    assert said.stdout.strip() == "[]"


def test_all_public_names_load() -> None:
    import fractal_runner

    for name in fractal_runner.__all__:
        assert getattr(fractal_runner, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = fractal_runner.nothing
