"""How a cluster is set up: what `LsfCluster` passes on to its scheduler."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Settings:
    """See `LsfCluster` for most of them.

    Attributes:
        directory: the cluster's.
        user: as whom jobs run, by name; in truth as whoever started the cluster.
        interpreter: the Python that clients run with.
    """

    directory: str
    dialect: str
    hosts: tuple[str, ...]
    slots: int
    master: str
    cluster: str
    user: str
    interpreter: str
    minute_s: float
    kill_interval_s: float
    kill_after_s: float
    clean_period_s: float
    dispatch_s: float
    requeue_s: float
    resume_s: float
    sample_s: float
    reply_timeout_s: float
    retry_s: float
    next_id: int
    max_id: int
