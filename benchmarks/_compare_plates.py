"""Compare the label images and feature tables of two copies of a plate; run by path, in the tasks' Python.

    PYTHON _compare_plates.py ONE OTHER LABEL TABLE

ONE and OTHER are plates. A line of JSON tells how much was compared, and each difference.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import zarr
from ngio import open_ome_zarr_container


def main() -> None:
    one, other, label, table = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4]
    images = _images(one)
    differences = [] if images == _images(other) else ["They do not have the same images."]
    labels = rows = features = 0
    for image in sorted(images & _images(other)):
        first, second = one / image / "labels" / label, other / image / "labels" / label
        found, counted = _compare_arrays(first, second)
        labels += counted
        differences += [f"{image}, label {label}: {what}" for what in found]
        found, shape = _compare_tables(_table(one / image, table), _table(other / image, table))
        rows, features = rows + shape[0], max(features, shape[1])
        differences += [f"{image}, table {table}: {what}" for what in found]
    result = {
        "images": len(images),
        "labels": labels,
        "rows": rows,
        "features": features,
        "differences": differences,
    }
    print(json.dumps(result))


def _images(plate: Path) -> set[str]:
    """The images of a plate, as row/column/image."""
    return {str(path.relative_to(plate)) for path in plate.glob("[A-Z]/[0-9]*/[0-9]*") if path.is_dir()}


def _compare_arrays(one: Path, other: Path) -> tuple[list[str], int]:
    """What differs between two label images, all levels of them, and how many labels there are."""
    first, second = zarr.open_group(one, mode="r"), zarr.open_group(other, mode="r")
    levels = sorted(name for name, _ in first.arrays())
    if levels != sorted(name for name, _ in second.arrays()):
        return ["other levels"], 0
    found = [] if first.attrs.asdict() == second.attrs.asdict() else ["other metadata"]
    labels = 0
    for level in levels:
        a, b = np.ascontiguousarray(first[level][...]), np.ascontiguousarray(second[level][...])
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            found.append(f"level {level} is {a.dtype} {a.shape}, not {b.dtype} {b.shape}")
        elif a.tobytes() != b.tobytes():
            found.append(f"level {level} differs in {np.count_nonzero(a != b)} of {a.size} pixels")
        if level == levels[0]:
            labels = len(np.unique(a[a != 0]))
    return found, labels


def _table(image: Path, name: str) -> pd.DataFrame:
    frame: pd.DataFrame = open_ome_zarr_container(str(image), mode="r").get_table(name).dataframe
    return frame


def _compare_tables(one: pd.DataFrame, other: pd.DataFrame) -> tuple[list[str], tuple[int, int]]:
    """What differs between two tables, to the last bit of a number, and the first one's shape."""
    if list(one.columns) != list(other.columns) or len(one) != len(other):
        return [f"{one.shape} with other columns or rows than {other.shape}"], one.shape
    found = [] if _equal(one.index, other.index) else ["other index"]
    found += [f"column {name}" for name in one.columns if not _equal(one[name], other[name])]
    return found, one.shape


def _equal(one: Any, other: Any) -> bool:
    a, b = one.to_numpy(), other.to_numpy()
    if one.dtype != other.dtype or a.dtype != b.dtype:
        return False
    return list(a) == list(b) if a.dtype == object else a.tobytes() == b.tobytes()


if __name__ == "__main__":
    main()
