"""What can be made to go wrong, by name. A test switches it on, for a number of times or for a while."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Each with its settings and their defaults. All take `count`, how often it strikes (None: until it is
# cleared), and `duration_s`, for how long.
FAULTS: dict[str, dict[str, Any]] = {
    # bsub says more than its reply, as sites' esub scripts do.
    "noise": {
        "before": "Checking your quota ... Job <7> of project <default> was fine.\n",
        "after": "** Mind the maintenance on Monday. **\n",
        "stderr": "esub: memory limit set to 4 GB\n",
    },
    # The job is submitted, and bsub does not say so: it is "killed", or ends "silent"ly with 255.
    "lost_reply": {"how": "killed"},
    # bsub refuses, without a reason of its own.
    "refuse": {"text": "User's pending job slot limit reached. Job not submitted.\n"},
    # bjobs prints nothing, or its header alone, and all is well by its exit code.
    "bjobs_empty": {"header": False},
    # These programs' exit codes say the opposite.
    "wrong_exit_codes": {"programs": ("bjobs", "bkill")},
    # Started jobs read UNKWN, all or these ids. They run.
    "unknown": {"jobs": None},
    # Jobs that were to read EXIT read DONE.
    "false_done": {},
    # bjobs does not know jobs that have ended, and bhist neither if told so.
    "forget": {"history": False},
    # Too many ask at a time.
    "query_limit": {"programs": ("bjobs", "bhist"), "text": "Batch system concurrent query limit exceeded\n"},
    # Something on stderr before a good answer.
    "please_wait": {"text": "LSF is processing your request. Please wait...\n"},
    # Nothing is started: queues are inactive.
    "no_dispatch": {},
    # An index list that is too large makes one plain job, also in IBM's dialect.
    "array_as_job": {},
    # Hosts do not have the directories that jobs were submitted in.
    "no_directory": {},
    # `bjobs -w` leaves an empty field empty, so that columns are not where they were.
    "shifted_columns": {},
    # Answers take a while.
    "slow": {"seconds": 0.5, "programs": ("bsub", "bjobs", "bkill", "bhist")},
}


class Faults:
    """The faults that are switched on."""

    def __init__(self) -> None:
        self._active: dict[str, dict[str, Any]] = {}

    def switch(self, name: str, now: float, settings: Mapping[str, Any]) -> None:
        """Switch one on. Raises ValueError for what there is not."""
        if name not in FAULTS:
            raise ValueError(f"no fault {name!r}: there are {', '.join(FAULTS)}")
        known = {"count": None, "duration_s": None, **FAULTS[name]}
        if unknown := [setting for setting in settings if setting not in known]:
            raise ValueError(f"{name}: no settings {unknown}: there are {', '.join(known)}")
        active = {**known, **settings}
        if active["duration_s"] is not None:
            active["until"] = now + active["duration_s"]
        self._active[name] = active

    def clear(self) -> None:
        """Switch all off."""
        self._active.clear()

    def strikes(self, name: str, now: float, program: str | None = None) -> dict[str, Any] | None:
        """The settings of a fault that happens now, and once less from now on; None if it does not."""
        active = self._active.get(name)
        if active is None or ("programs" in active and program not in active["programs"]):
            return None
        if now > active.get("until", now) or active["count"] == 0:
            del self._active[name]
            return None
        if active["count"] is not None:
            active["count"] -= 1
        return active
