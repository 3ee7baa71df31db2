"""The two schedulers that the cluster can be: what they say differently, as tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

# bsub(1) of the openlava family, as its usage has it. Its getopt takes what follows a letter as the value.
_OPENLAVA_FLAGS = ("h", "V", "x", "H", "r", "N", "B", "I", "K", "Ip", "Is")
_OPENLAVA_VALUES = (*"LcFWkPqRmnJbtuioeMDSfwEa", "Jd", "is", "Ep", "sp", "pack", "Zs")
_IBM_FLAGS = ("h", "V", "x", "H", "r", "rn", "N", "B", "I", "K", "Ip", "Is", "ul", "XF", "hl")
_IBM_VALUES = (
    *"aBbCcDEefFGgiJkLmMnoPqQRsSTtUuvwWpk",
    *("app", "cwd", "data", "env", "eo", "Ep", "ext", "freq", "gpu", "hostfile", "is", "Jd", "jsdl", "Lp"),
    *(
        "mig",
        "network",
        "notify",
        "oo",
        "outdir",
        "pack",
        "rnc",
        "sla",
        "sp",
        "stage",
        "ti",
        "We",
        "wa",
        "wt",
    ),
)

_BSUB_USAGE = """\
Usage: bsub [-h] [-V] [-x] [-H] [-r] [-N] [-B] [-I | -K | -Ip | -Is]
\t\t[-L login_shell] [-c cpu_limit[/host_spec]] [-F file_limit]
\t\t[-W run_limit[/host_spec]] [-k chkpnt_dir [chkpnt_period] [method=chkpnt_dir]]
\t\t[-P project_name] 
\t\t[-q queue_name ...]  [-R res_req]
\t\t[-m "host_name[+[pref_level]] | host_group[+[pref_level]]...]"
\t\t[-n min_processors[,max_processors]] [-J job_name] [-Jd job_desc]
\t\t[-b begin_time] [-t term_time] [-u mail_user]
\t\t[-i in_file | -is in_file] [-o out_file] [-e err_file]
\t\t[-M mem_limit]  [-D data_limit]  [-S stack_limit]
\t\t[[-f "lfile op [rfile]"] ...] [-w depend_cond]
\t\t[-E "pre_exec_command [argument ...]"] [-Zs]
\t\t[-Ep "post_exec_command [argument ...]"
\t\t[-sp job_priority]
\t\t[-pack job_submission_file]
\t\t[-a additional_esub_information]
\t\tcommand [argument ...]
"""
_BJOBS_USAGE = """\
Usage: bjobs [-h] [-V] [-w |-l |-UF] [-a] [-d] [-p] [-s] [-r] [-o] [-json] [-A]
             [-m host_name] [-q queue_name] [-u user_name | -u all]
             [-P project_name] [-N host_spec]
             [-J name_spec] [jobId | "jobId[idxList]" ...]
"""

# bjobs(1), -o, with the widths that columns have if none is given. The openlava family knows the first ones.
_OPENLAVA_FIELDS = {
    "jobid": 7,
    "stat": 5,
    "user": 7,
    "queue": 10,
    "job_name": 10,
    "proj_name": 11,
    "from_host": 11,
    "exec_host": 11,
    "submit_time": 15,
    "start_time": 15,
    "finish_time": 16,
}
_IBM_FIELDS = {
    **_OPENLAVA_FIELDS,
    "jobindex": 8,
    "exit_code": 10,
    "exit_reason": 50,
    "max_mem": 10,
    "mem": 10,
    "slots": 5,
    "nexec_host": 10,
    "command": 15,
    "run_time": 15,
    "cpu_used": 10,
    "pids": 20,
    "sub_cwd": 10,
    "exec_cwd": 10,
    "output_file": 15,
    "pend_reason": 11,
}

# bhist(1), bjobs(1), "Job termination reasons": what stands behind the name.
REASONS: dict[str, str] = {
    "TERM_ADMIN": "job killed by root or LSF administrator",
    "TERM_EXTERNAL_SIGNAL": "job killed by a signal external to LSF",
    "TERM_FORCE_OWNER": "job killed by owner without time for cleanup",
    "TERM_MEMLIMIT": "job killed after reaching LSF memory usage limit",
    "TERM_OWNER": "job killed by owner",
    "TERM_PREEMPT": "job killed after preemption",
    "TERM_REQUEUE_OWNER": "job killed and requeued by owner",
    "TERM_RUNLIMIT": "job killed after reaching LSF run time limit",
}

_LIBRARY = "Failed in an LSF library call: "
_OPENLAVA_VERSION = "volclava project 2.2\n"
_IBM_VERSION = (
    "IBM Spectrum LSF Standard 10.1.0.14, Jul 12 2023\n"
    "Copyright International Business Machines Corp. 1992, 2016.\n"
    "US Government Users Restricted Rights - Use, duplication or disclosure restricted by "
    "GSA ADP Schedule Contract with IBM Corp.\n"
)


@dataclass(frozen=True, slots=True)
class Dialect:
    """How one of them speaks.

    Attributes:
        no_answer: what a client says while it goes on trying, and when it gives up, by what is the matter.
        memory_unit: of `-M` without a suffix, in bytes.
        memory_suffixes: whether `-M` may have one.
        kills_at_run_limit: whether a job that ignores SIGUSR2 at its run limit is killed later.
        exec_hides_signals: whether a job whose shell `exec`ed something else reads DONE if that was killed.
        array_kill_in_progress: whether `bkill` of a whole array is carried out and said to fail.
        wraps_at: columns of all `-l` output; None: of bhist's events alone, in 79.
        tells_reasons: whether there are TERM_* reasons.
    """

    name: str
    version: str
    version_on_stderr: bool
    bsub_flags: tuple[str, ...]
    bsub_values: tuple[str, ...]
    bsub_usage: str
    bjobs_usage: str
    fields: Mapping[str, int]
    no_answer: Mapping[str, tuple[str, str]]
    memory_unit: int
    memory_suffixes: bool
    kills_at_run_limit: bool
    exec_hides_signals: bool
    big_array_is_one_job: bool
    array_kill_in_progress: bool
    wraps_at: int | None
    tells_reasons: bool
    longest_name: int
    nothing_by_name: int

    @property
    def is_ibm(self) -> bool:
        return self.name == "ibm"


DIALECTS: dict[str, Dialect] = {
    "openlava": Dialect(
        name="openlava",
        version=_OPENLAVA_VERSION,
        version_on_stderr=False,
        bsub_flags=_OPENLAVA_FLAGS,
        bsub_values=_OPENLAVA_VALUES,
        bsub_usage=_BSUB_USAGE,
        bjobs_usage=_BJOBS_USAGE,
        fields=_OPENLAVA_FIELDS,
        no_answer={
            "mbatchd": (
                "batch system daemon not responding ... still trying",
                f"{_LIBRARY}Connection refused by server",
            ),
            "all": (
                "LSF daemon (LIM) not responding ... still trying",
                f"{_LIBRARY}LIM is down; try later",
            ),
            "hung": (
                "batch system daemon not responding ... still trying",
                f"{_LIBRARY}Communication time out",
            ),
        },
        memory_unit=2**20,
        memory_suffixes=False,
        kills_at_run_limit=False,
        exec_hides_signals=True,
        big_array_is_one_job=True,
        array_kill_in_progress=True,
        wraps_at=None,
        tells_reasons=False,
        longest_name=255,
        nothing_by_name=254,
    ),
    "ibm": Dialect(
        name="ibm",
        version=_IBM_VERSION,
        version_on_stderr=True,
        bsub_flags=_IBM_FLAGS,
        bsub_values=_IBM_VALUES,
        bsub_usage="Usage: bsub [-h] [-V] [options] command [arguments]\n",
        bjobs_usage="Usage: bjobs [-h] [-V] [options] [job_ID ...]\n",
        fields=_IBM_FIELDS,
        no_answer={
            "mbatchd": (
                "LSF is processing your request. Please wait...",
                f"{_LIBRARY}Connection refused by server",
            ),
            "all": ("LSF is down. Please wait...", f"{_LIBRARY}LIM is down; try later"),
            "hung": (
                "LSF is processing your request. Please wait...",
                f"{_LIBRARY}Communication time out",
            ),
        },
        memory_unit=2**10,
        memory_suffixes=True,
        kills_at_run_limit=True,
        exec_hides_signals=False,
        big_array_is_one_job=False,
        array_kill_in_progress=False,
        wraps_at=80,
        tells_reasons=True,
        longest_name=4094,
        nothing_by_name=255,
    ),
}
