"""Engines that come with an extra of the package: whether they are here, and what to do where they are not.

Apart from the executors that need them, as it must work, and say the same of each, where nothing of them is
installed.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Extra:
    """What an executor needs beside the package itself.

    Attributes:
        executor: the class that needs it.
        engine: what it is called.
        name: the extra's name.
        modules: what has to be there to be imported.
    """

    executor: str
    engine: str
    name: str
    modules: tuple[str, ...]

    @property
    def command(self) -> str:
        """The line that installs it."""
        return f"pip install 'fractal-runner[{self.name}]'"

    def lacking(self) -> str | None:
        """What is not installed here, with what installs it; None if nothing is. Nothing is imported."""
        missing = self._missing()
        return None if missing is None else f"{missing} is not installed: {self.command}"

    def error(self, cause: ImportError) -> ImportError:
        """The error for who has asked for the executor, where importing its engine has failed."""
        why = self.lacking() or f"importing it fails ({cause}): {self.command}"
        return ImportError(
            f"{self.executor} needs {self.engine}, and here {why}", name=self._missing() or cause.name
        )

    def _missing(self) -> str | None:
        return next((module for module in self.modules if not _is_there(module)), None)


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # somebody hides it, or it is there in a way that cannot be imported
        return False


DASK = Extra("DaskExecutor", "Dask", "dask", ("distributed", "cryptography"))
RAY = Extra("RayExecutor", "Ray", "ray", ("ray",))
