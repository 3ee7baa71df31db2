"""How many processes the kernel has ended for want of memory, as control groups of both versions count."""

from __future__ import annotations

from pathlib import Path

import pytest

from fractal_runner.worker.memory import oom_kills


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    (tmp_path / "proc").mkdir()
    return tmp_path / "proc"


def tell(proc: Path, cgroup: str, mountinfo: str) -> None:
    (proc / "cgroup").write_text(cgroup)
    (proc / "mountinfo").write_text(mountinfo.format(top=proc.parent))


def count(proc: Path, place: str, text: str) -> None:
    path = proc.parent / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


V2 = "low 0\nhigh 0\nmax 41\noom 3\noom_kill {}\noom_group_kill 0\n"
V1 = "oom_kill_disable 0\nunder_oom 0\noom_kill {}\n"
STEP = "/system.slice/slurmstepd.scope/job_7/step_batch/user/task_0"
V2_MOUNT = "35 24 0:30 / {top}/cg rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"


def test_version_2_counts_in_our_own_group(proc: Path) -> None:
    tell(proc, f"0::{STEP}\n", "24 1 259:1 / / rw shared:1 - ext4 /dev/root rw\n" + V2_MOUNT)
    count(proc, f"cg{STEP}/memory.events", V2.format(2))
    assert oom_kills(str(proc)) == 2


def test_version_1_counts_in_the_memory_controllers_group(proc: Path) -> None:
    tell(
        proc,
        "5:memory:/slurm/uid_0/job_7/step_0\n3:cpu,cpuacct:/slurm/other\n0::/\n",
        "40 35 0:33 / {top}/cpu rw - cgroup cgroup rw,cpu,cpuacct\n"
        "41 35 0:34 / {top}/memory rw - cgroup cgroup rw,memory\n",
    )
    count(proc, "memory/slurm/uid_0/job_7/step_0/memory.oom_control", V1.format(5))
    count(proc, "cpu/slurm/other/memory.oom_control", V1.format(9))
    assert oom_kills(str(proc)) == 5


def test_where_both_versions_are_mounted_the_one_that_has_memory_counts(proc: Path) -> None:
    tell(
        proc,
        "5:memory:/job\n0::/job\n",
        V2_MOUNT + "41 35 0:34 / {top}/memory rw - cgroup cgroup rw,memory\n",
    )
    (proc.parent / "cg" / "job").mkdir(parents=True)  # its memory.events is not there
    count(proc, "memory/job/memory.oom_control", V1.format(1))
    assert oom_kills(str(proc)) == 1


def test_a_container_sees_its_group_as_the_mounts_root(proc: Path) -> None:
    tell(proc, "0::/docker/abc/job\n", V2_MOUNT.replace(" / {top}", " /docker/abc {top}"))
    count(proc, "cg/job/memory.events", V2.format(4))
    assert oom_kills(str(proc)) == 4


@pytest.mark.parametrize("text", ["", "low 0\n", "oom_kill many\n"])
def test_a_count_that_is_not_there_is_unknown(proc: Path, text: str) -> None:
    tell(proc, "0::/\n", V2_MOUNT)
    count(proc, "cg/memory.events", text)
    assert oom_kills(str(proc)) is None


def test_a_system_without_control_groups_knows_nothing(proc: Path) -> None:
    assert oom_kills(str(proc)) is None


def test_this_system_is_asked_without_an_error() -> None:
    assert oom_kills() is None or oom_kills() >= 0  # type: ignore[operator]
