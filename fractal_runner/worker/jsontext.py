"""JSON encoders for many small values.

`json.JSONEncoder.encode` sets up its C encoder for each value, which for a small one takes longer than
encoding it. Here it is set up once.
"""

from __future__ import annotations

import json
import json.encoder
from collections.abc import Callable
from typing import Any


def encoder(
    *, sort_keys: bool = False, allow_nan: bool = True, separators: tuple[str, str] = (", ", ": ")
) -> Callable[[Any], str]:
    """A function from a value to its JSON text.

    Args:
        sort_keys: objects by their keys.
        allow_nan: write NaN and infinities, which JSON does not have.
        separators: between items, and between a key and its value.

    Returns:
        The function. It raises what `json.dumps` does, and RecursionError for what contains itself.
    """
    plain = json.JSONEncoder(sort_keys=sort_keys, allow_nan=allow_nan, separators=separators)
    make: Any = getattr(json.encoder, "c_make_encoder", None)
    if make is None:  # an interpreter without the C part
        return plain.encode
    item, key = separators
    text: Any = json.encoder.encode_basestring_ascii
    parts = make(None, plain.default, text, None, key, item, sort_keys, False, allow_nan)

    def encode(value: Any) -> str:
        return "".join(parts(value, 0))

    return encode
