"""Pickles of calls and results: the fast way where it does, by value where it does not."""

from __future__ import annotations

import io
import pickle
from typing import Any

import cloudpickle


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
