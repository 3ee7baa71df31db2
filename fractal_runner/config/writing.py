"""A configuration as text: YAML that reads as the same values again, in whatever version of YAML."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator

from fractal_runner.config.values import Items, Node, Origin, Scalar, Table
from fractal_runner.config.yaml12 import scalar

# What needs no quotes; much that needs none has some.
_PLAIN_TEXT = re.compile(r"[A-Za-z/][\w/.@%+=~^&|:;()<>* -]*|\d+(?:\.\d+)?(?:[KMGT]i?B?|[smhd])", re.ASCII)
_PLAIN_KEY = re.compile(r"[A-Za-z_][\w.-]*", re.ASCII)
# Text in YAML 1.2, and not in the version that most tools read.
_NOT_TEXT_ELSEWHERE = re.compile(r"y|n|yes|no|on|off", re.IGNORECASE)


def written(node: Node, depth: int = 0) -> Iterator[tuple[str, Origin | None]]:
    """Lines of YAML that say the same, each with the origin of the value in it, if there is one."""
    indent = "  " * depth
    if isinstance(node, Table):
        for name, value in node.entries.items():
            key = f"{indent}{_key_text(name)}:"
            if isinstance(value, Scalar) or _is_empty(value):
                yield f"{key} {_text(value)}", value.origin
            else:
                yield key, None
                yield from written(value, depth + 1)
    elif isinstance(node, Items):
        for item in node.items:
            # What a list has in it is written in one line, within brackets.
            yield f"{indent}- {_text(item)}", item.origin


def _is_empty(node: Node) -> bool:
    return not (isinstance(node, Items) and node.items) and not (isinstance(node, Table) and node.entries)


def _key_text(name: str) -> str:
    return name if _PLAIN_KEY.fullmatch(name) and _is_text_everywhere(name) else _quoted(name)


def _text(node: Node) -> str:
    if isinstance(node, Items):
        return f"[{', '.join(map(_inner_text, node.items))}]"
    if isinstance(node, Table):
        return f"{{{', '.join(f'{_quoted(n)}: {_inner_text(v)}' for n, v in node.entries.items())}}}"
    value = node.value
    if isinstance(value, float) and not math.isfinite(value):
        return ".nan" if math.isnan(value) else (".inf" if value > 0 else "-.inf")
    if not isinstance(value, str):
        return json.dumps(value)
    is_plain = _PLAIN_TEXT.fullmatch(value) and ": " not in value and value[-1] not in ": "
    return value if is_plain and _is_text_everywhere(value) else _quoted(value)


def _inner_text(node: Node) -> str:
    """A value within brackets, where text needs its quotes."""
    return _quoted(node.value) if isinstance(node, Scalar) and isinstance(node.value, str) else _text(node)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=not text.isprintable())


def _is_text_everywhere(text: str) -> bool:
    return scalar(text) == text and not _NOT_TEXT_ELSEWHERE.fullmatch(text)
