"""Where a station is: what the dead have left there, who else can write there, and no place at all."""

from __future__ import annotations

import json
import os
import pickle
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fractal_runner.worker import processes
from fractal_runner.worker.command import run_unit
from fractal_runner.worker.spec import COLD, WARM
from fractal_runner.worker.station import Station
from tests.worker.pairs import Bench, until
from tests.worker.site import Site, well


@pytest.fixture
def site(bench: Bench, spec: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    with Site(bench, spec, monkeypatch) as site:
        yield site


_OWNER = """
import os, pickle, sys, time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from fractal_runner.worker import processes
from fractal_runner.worker.command import run_unit
from fractal_runner.worker.station import Station
specs = pickle.load(open(sys.argv[1], "rb"))
station = Station.of(os.getpid())
def own(spec):
    terms = replace(spec.warm, station=station.directory, ticks=station.ticks)
    return replace(spec, warm=terms, coordinator=(processes.host_name(), os.getpid()))
with ThreadPoolExecutor() as pool:
    futures = [pool.submit(run_unit, own(spec)) for spec in specs]
    print(station.directory, flush=True)
    [future.result() for future in futures]
    time.sleep(600)
"""


def test_servers_end_with_their_owner_and_the_next_station_sweeps_what_is_left(
    site: Site, tmp_path: Path
) -> None:
    running, idle = site.spec(site.waiting()), site.spec(site.quick())
    (tmp_path / "specs").write_bytes(pickle.dumps([running, idle]))
    command = [sys.executable, "-c", _OWNER, str(tmp_path / "specs")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None
        theirs = Path(owner.stdout.readline().decode().strip())
        unit = site.pid_of(running)
        until(lambda: len(list(theirs.glob("*.json"))) == 2)
        owner.kill()
    try:
        until(lambda: site.left() == [unit])  # it is looked after by whoever resumes the run
    finally:
        os.killpg(unit, signal.SIGKILL)
    assert theirs.is_dir()
    assert run_unit(site.spec(site.quick())).start == WARM

    assert not theirs.exists()
    assert Path(site.station.directory).is_dir()


def test_what_others_have_is_not_swept(site: Site) -> None:
    uid, pid = os.getuid(), os.getpid()
    gone = subprocess.Popen(["true"])
    gone.wait()
    world = Path(site.station.directory).name.split("-")[3]
    kept = [
        f"fractal-runner-{uid + 1}-{world}-{gone.pid}-1-0",
        f"fractal-runner-{uid}-00000000-{gone.pid}-1-0",  # another host's, or another container's
        f"fractal-runner-{uid}-{world}-{os.getppid()}-{processes.start_ticks(os.getppid())}-0",
        f"fractal-runner-{uid}-{world}-{gone.pid}-0",
        f"fractal-runner-{uid}-{world}-{gone.pid}-1-x",
        f"x-fractal-runner-{uid}-{world}-{gone.pid}-1-0",
    ]
    swept = [f"fractal-runner-{uid}-{world}-{gone.pid}-1-0", f"fractal-runner-{uid}-{world}-{pid}-1-3"]
    for name in [*kept, *swept]:
        (site.base / name).mkdir()
    assert run_unit(site.spec(site.quick())).start == WARM

    assert sorted({path.name for path in site.base.iterdir()}) == sorted(
        [*kept, Path(site.station.directory).name]
    )


def test_a_link_is_not_followed_when_it_is_swept(site: Site, tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").touch()
    world = Path(site.station.directory).name.split("-")[3]
    (site.base / f"fractal-runner-{os.getuid()}-{world}-1-1-0").symlink_to(tmp_path / "precious")
    assert run_unit(site.spec(site.quick())).start == WARM

    assert (tmp_path / "precious" / "file").exists()


OPEN = {
    "to its group": lambda path: path.chmod(0o770),
    "to all": lambda path: path.chmod(0o777),
    "to look": lambda path: path.chmod(0o755),
    "another's": lambda path: os.chown(path, 1, 1),
}


@pytest.mark.parametrize("spoil", OPEN.values(), ids=OPEN)
def test_a_directory_that_is_not_ours_alone_is_refused(site: Site, spoil: Any) -> None:
    if os.getuid() and spoil is OPEN["another's"]:
        pytest.skip("only root can give a directory away")
    directory = Path(site.station.directory)
    directory.mkdir(0o700)
    spoil(directory)
    result = run_unit(site.spec(site.quick()))

    assert (result.returncode, result.start) == (0, COLD)
    assert result.why_cold == f"{directory} is open to others, or theirs."
    assert list(directory.iterdir()) == []


@pytest.mark.parametrize("what", ["file", "link", "dangling"])
def test_what_is_no_directory_is_refused(site: Site, tmp_path: Path, what: str) -> None:
    directory = Path(site.station.directory)
    if what == "file":
        directory.touch()
    else:
        directory.symlink_to(tmp_path if what == "link" else tmp_path / "missing")
    result = run_unit(site.spec(site.quick()))

    assert (result.returncode, result.start) == (0, COLD)
    assert str(directory) in result.why_cold
    site.station.end_servers()
    site.station.remove()
    assert os.path.lexists(directory)


@pytest.mark.parametrize("mode", [0o777, 0o770])
def test_who_can_write_into_a_directory_cannot_have_processes_ended(site: Site, mode: int) -> None:
    directory = Path(site.station.directory)
    directory.mkdir()
    directory.chmod(mode)
    with subprocess.Popen(["sleep", "300"]) as victim:
        told = {"socket": f"{directory}/x", "pid": victim.pid, "ticks": processes.start_ticks(victim.pid)}
        (directory / "0.json").write_text(json.dumps(told))
        site.station.end_servers()
        site.station.remove()
        code = victim.poll()
        victim.kill()

    assert code is None
    assert (directory / "0.json").exists()


@pytest.mark.parametrize("base", ["relative", "/proc", "/no/such/place", "long"])
def test_a_place_for_temporary_files_that_is_of_no_use(
    site: Site, monkeypatch: pytest.MonkeyPatch, base: str
) -> None:
    if base == "long":
        (site.base / ("x" * 100)).mkdir()
        base = str(site.base / ("x" * 100))
    monkeypatch.setenv("TMPDIR", base)
    station = Station.of(os.getpid())
    try:
        result = run_unit(site.spec(site.quick(), terms={"station": station.directory}))
        # As root one may write to /proc, as far as access(2) tells, and then cannot.
        assert result.returncode == 0
        if base == "/proc" and result.start == COLD:
            assert f"{station.directory} cannot be made: No such file or directory." == result.why_cold
        else:
            assert result.start == WARM
            assert station.directory.startswith("/tmp/fractal-runner-")
    finally:
        station.remove()
    assert not Path(station.directory).exists()


def test_a_place_is_taken_only_if_a_socket_fits(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda *_: True)
    for length in range(10, 90):
        monkeypatch.setenv("TMPDIR", "/" + "x" * (length - 1))
        directory = Station.of(os.getpid()).directory
        there = len(f"/{'x' * (length - 1)}/{Path(directory).name}/warm-abcdefgh/socket") <= 107
        assert directory.startswith("/xxx" if there else "/tmp/"), length


def test_a_disk_that_is_full_costs_no_unit(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it says of a server cannot be written: the unit goes on, and no server is left unknown."""
    words = site.quick()
    assert run_unit(site.spec(words)).start == WARM
    [known] = Path(site.station.directory).glob("*.json")
    site.station.end_servers()
    blocking = Path(site.station.directory, f"{known.stem}.{os.getpid()}.tmp")
    blocking.mkdir()  # as good as no space
    result = run_unit(site.spec(words))

    assert well([result])
    assert len(site.left()) == len(site.links)


def test_a_station_is_its_owners_alone(site: Site) -> None:
    assert run_unit(site.spec(site.quick())).start == WARM
    directory = Path(site.station.directory)

    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert [stat.S_IMODE(path.stat().st_mode) for path in directory.glob("warm-*")] == [0o700]
    assert tempfile.gettempdir() != str(directory)
