"""Pickles of calls and results: the fast way where it does, by value where it does not."""

from __future__ import annotations

import io
import pickle
from typing import Any

import cloudpickle


class _ErrorPickler(cloudpickle.Pickler):  # type: ignore[misc]
    """Pickles exceptions as they say themselves.

    Packages that carry tracebacks over (tblib, which Dask loads) register a way of their own for each class
    of exceptions, by which those of C lose what is not in `args`: the code of a SystemExit.
    """

    @property
    def dispatch_table(self) -> dict[type, Any]:
        known = super().dispatch_table
        return {
            kind: known[kind]
            for kind in known
            if not (isinstance(kind, type) and issubclass(kind, BaseException))
        }


def dump_error(error: BaseException) -> bytes:
    """An exception, as a pickle.

    Raises:
        Exception: of many types, if it cannot be pickled.
    """
    buffer = io.BytesIO()
    _ErrorPickler(buffer).dump(error)
    return buffer.getvalue()


def dump(kind: bytes, value: Any) -> memoryview:
    """A message: `kind`, and `value` as a pickle.

    Cloudpickle takes several times as long as pickle, and is needed for what cannot be imported where
    the message is read: lambdas, closures, and whatever is defined in `__main__`, which is another module
    in each process.

    Raises:
        Exception: of many types, if `value` cannot be pickled either way.
    """
    if not cloudpickle.list_registry_pickle_by_value():
        try:
            buffer = io.BytesIO()
            buffer.write(kind)
            pickle.Pickler(buffer, pickle.HIGHEST_PROTOCOL).dump(value)
        except Exception:  # pickling runs anybody's code; cloudpickle does it, or says why it cannot
            buffer = io.BytesIO()
        else:
            if b"__main__" not in (message := buffer.getvalue()):
                return memoryview(message)
    buffer = io.BytesIO()
    buffer.write(kind)
    cloudpickle.Pickler(buffer).dump(value)
    return buffer.getbuffer()
