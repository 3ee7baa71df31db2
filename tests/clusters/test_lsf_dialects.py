"""The LSF that tests use has the words of both families, where they were not recorded."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from tests.clusters.lsf import LsfCluster, LsfFailed
from tests.clusters.lsf.waiting import wait_until

# IBM's words.


def test_ibm_tells_fields_between_delimiters(ibm: LsfCluster) -> None:
    killed, done = ibm.submit("sleep 60", "-J", "k[4]"), ibm.submit("true")
    ibm.wait_for(killed, "RUN")
    ibm.run("bkill", str(killed))
    ibm.wait_for(killed, "EXIT")
    ibm.wait_for(done, "DONE")

    fields = "jobid jobindex stat exit_code exit_reason job_name delimiter='^'"
    said = ibm.run("bjobs", "-noheader", "-o", fields, str(killed), str(done)).stdout

    assert said == f"{killed}^4^EXIT^130^TERM_OWNER: job killed by owner^k[4]\n{done}^0^DONE^-^-^true\n"
    with_header = ibm.run("bjobs", "-o", "jobid stat delimiter=','", str(done)).stdout
    assert with_header == f"JOBID,STAT\n{done},DONE\n"


def test_ibm_wraps_its_long_form(ibm: LsfCluster) -> None:
    job = ibm.submit(
        "sleep 60", "-W", "1", "-J", "a_name_that_makes_the_first_line_long_enough_to_be_wrapped"
    )
    ibm.wait_for(job, "EXIT")

    for command in ("bjobs", "bhist"):
        said = ibm.run(command, "-l", str(job)).stdout
        assert max(map(len, said.splitlines())) == 80
        whole = said.replace("\n" + 21 * " ", "")
        assert "Job Name <a_name_that_makes_the_first_line_long_enough_to_be_wrapped>," in whole
        assert "Completed <exit>; TERM_RUNLIMIT: job killed after reaching LSF run time limit" in whole


def test_ibm_says_its_version(ibm: LsfCluster) -> None:
    assert ibm.run("bjobs", "-V").stderr.startswith("IBM Spectrum LSF Standard 10.1.0")
    assert "My cluster name is labcl\n" in ibm.run("lsid").stdout


def test_ibm_takes_what_is_its_own(ibm: LsfCluster, tmp_path: Path) -> None:
    (tmp_path / "x").write_text("before")
    options = ("-gpu", "num=1", "-M", "4GB", "-app", "a", "-oo", "x", "-cwd", str(tmp_path), "-g", "/a/b")

    ibm.wait_for(ibm.submit("pwd", *options, cwd=tmp_path), "DONE")

    assert (tmp_path / "x").read_text().startswith("Sender:")


def test_ibm_refuses_too_large_arrays(ibm: LsfCluster) -> None:
    with pytest.raises(LsfFailed, match="Job array index too large"):
        ibm.submit("true", "-J", "big[1-2000]")
    ibm.switch("array_as_job")

    assert [job.index for job in ibm.jobs(ibm.submit("true", "-J", "big[1-2000]"))] == [0]


def test_ibm_cuts_long_ids_unless_told_their_width(ibm: LsfCluster) -> None:
    ibm.set_next_id(123456789, max_id=999999999)
    job = str(ibm.submit("sleep 60"))

    assert ibm.run("bjobs", "-w", job).stdout.splitlines()[1].startswith("*456789 ")
    assert ibm.run("bjobs", "-noheader", "-o", "jobid:12", job).stdout.strip() == job


def test_a_site_has_columns_of_its_own(ibm: LsfCluster) -> None:
    job = str(ibm.submit("sleep 60"))

    said = ibm.run("bjobs", job, env={"LSB_BJOBS_FORMAT": "stat jobid"}).stdout

    assert said.split()[:2] == ["STAT", "JOBID"]


def test_openlava_says_done_of_what_was_execed_and_killed(openlava: LsfCluster) -> None:
    job = openlava.submit("exec sleep 60")
    openlava.wait_for(job, "RUN")
    wait_until(lambda: psutil.Process(openlava.jobs(job)[0].pid).name() == "sleep")

    openlava.run("bkill", str(job))

    openlava.wait_for(job, "DONE")


@pytest.mark.parametrize("options", [("-M", "4GB"), ("-gpu", "num=1"), ("-ti", "x"), ("-cwd", "/tmp")])
def test_openlava_refuses_what_is_ibms(openlava: LsfCluster, options: tuple[str, str]) -> None:
    with pytest.raises(LsfFailed):
        openlava.submit("true", *options)
