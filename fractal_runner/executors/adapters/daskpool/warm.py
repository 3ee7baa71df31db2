"""Pools that are kept between runs."""

from __future__ import annotations

from dataclasses import dataclass

from fractal_runner.executors.adapters.daskpool.terms import Shape
from fractal_runner.executors.adapters.daskpool.tls import TlsFiles


@dataclass(frozen=True, slots=True)
class PoolRecord:
    address: str
    tls: TlsFiles
    shape: Shape
    max_workers: int


def find_pool(name: str) -> PoolRecord:
    raise NotImplementedError
