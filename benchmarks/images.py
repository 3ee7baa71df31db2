"""Images: from tasks' raw outputs to the new dataset, validation included, and filtering it.

Two shapes of output: one unit that lists all images (a converter), and as many units as images, each
listing one (a compound converter). The yardstick is what one would write first: a pydantic model per
image, validated from the same dicts, the garbage collector left on.
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable
from typing import Any

from pydantic import BaseModel, Field

from benchmarks._child import call, memory_now, peak_memory
from benchmarks._report import Report, alternate, mb, median, medians, ratio, seconds
from benchmarks._scratch import Scratch
from fractal_runner import Dataset
from fractal_runner.workflow.images import ImageList
from fractal_runner.workflow.outputs import UnitOutput, collector_paused, merge, validate_output

COUNTS = (1_000, 10_000, 100_000, 1_000_000)
REPETITIONS = 3
SHAPES = {"one": "one output of all images", "each": "one output per image"}

_ZARR_DIR = "/data/benchmark"
_WELLS = 96
_CHUNK = 1_000
_TYPES = {"is_3D": True}
_ATTRIBUTES = {"well": ["A01", "B02", "H12"]}


def run(report: Report, scratch: Scratch) -> None:
    """Measure both shapes for all counts. `scratch` is not needed: nothing is written."""
    figures: dict[str, dict[int, dict[str, list[dict[str, Any]]]]] = {shape: {} for shape in SHAPES}
    for shape, count in ((shape, count) for shape in SHAPES for count in COUNTS):
        figures[shape][count] = alternate(
            REPETITIONS,
            {
                "fractal_runner": lambda shape=shape, count=count: call(
                    "benchmarks.images:ours", count=count, shape=shape
                ),
                "pydantic": lambda shape=shape, count=count: call(
                    "benchmarks.images:naive", count=count, shape=shape
                ),
            },
            f"images: {count:,}, {SHAPES[shape]}",
        )
    report.figures.update(figures)
    for shape, title in SHAPES.items():
        _merging(report, title, figures[shape])
    _filtering(report, figures["one"])
    report.note("pydantic: a BaseModel per image, validated from the same dicts, the collector left on.")
    report.note("peak memory is the whole process's; in brackets, what of it is beyond the raw outputs.")


def _merging(report: Report, title: str, taken: dict[int, dict[str, list[dict[str, Any]]]]) -> None:
    base = medians(taken[100_000]["fractal_runner"], "seconds") / 100_000
    rows = []
    for count, both in taken.items():
        ours, naive = both["fractal_runner"], both["pydantic"]
        time_ours = medians(ours, "seconds")
        rows.append(
            [
                f"{count:,}",
                seconds(time_ours),
                seconds(medians(ours, "cpu_seconds")),
                seconds(time_ours / count),
                f"{time_ours / count / base:.2f}",
                _memory(ours),
                seconds(medians(naive, "seconds")),
                seconds(medians(naive, "cpu_seconds")),
                f"{ratio(ours, naive):.2f}",
                _memory(naive),
            ]
        )
    columns = ["images", "in all", "CPU", "an image", "× 100,000's", "peak memory"]
    report.table(
        f"From raw output to the new Dataset, {title}",
        [*columns, "pydantic", "its CPU", "ratio", "its peak memory"],
        rows,
    )
    million = medians(taken[1_000_000]["fractal_runner"], "seconds")
    report.at_most(f"1,000,000 images, {title}", 15, million, "s")
    report.at_most(f"an image of 1,000,000 to one of 100,000, {title}", 2, million / 1_000_000 / base)


def _filtering(report: Report, taken: dict[int, dict[str, list[dict[str, Any]]]]) -> None:
    base = medians(taken[100_000]["fractal_runner"], "select_seconds") / 100_000
    rows = []
    for count, both in taken.items():
        ours, naive = both["fractal_runner"], both["pydantic"]
        in_all = medians(ours, "select_seconds")
        rows.append(
            [
                f"{count:,}",
                f"{ours[0]['selected']:,}",
                seconds(in_all),
                seconds(in_all / count),
                f"{in_all / count / base:.2f}",
                seconds(medians(naive, "select_seconds")),
                f"{ratio(ours, naive, 'select_seconds'):.2f}",
            ]
        )
    columns = ["images", "selected", "in all", "an image", "× 100,000's", "list of models", "ratio"]
    report.table("Filtering by one type and one attribute (three values of it)", columns, rows)


def _memory(figures: list[dict[str, Any]]) -> str:
    peak = medians(figures, "peak_bytes")
    return f"{mb(peak)} ({mb(peak - medians(figures, 'raw_bytes'))})"


class NaiveImage(BaseModel):
    """An image as one would write it first."""

    zarr_url: str
    origin: str | None = None
    attributes: dict[str, str | int | float | bool | None] = Field(default_factory=dict)
    types: dict[str, bool] = Field(default_factory=dict)


def ours(count: int, shape: str) -> dict[str, Any]:
    """In a fresh process: raw outputs to the dataset by fractal_runner, then a selection."""
    _merged(_raw(1, shape))  # what happens once per process is not what is measured
    raw = _raw(count, shape)
    before = memory_now()
    began, cpu = time.perf_counter(), time.process_time()
    dataset = _merged(raw)
    took, cpu = time.perf_counter() - began, time.process_time() - cpu
    assert len(dataset.images) == count
    images = ImageList(dataset.images)
    return {
        "seconds": took,
        "cpu_seconds": cpu,
        "peak_bytes": peak_memory(),
        "raw_bytes": before,
        **_timed_selection(lambda: images.select(_TYPES, _ATTRIBUTES)),
    }


def naive(count: int, shape: str) -> dict[str, Any]:
    """In a fresh process: the same with a list of pydantic models."""
    raw = _raw(count, shape)
    before = memory_now()
    began, cpu = time.perf_counter(), time.process_time()
    images = [NaiveImage.model_validate(update) for output in raw for update in output["image_list_updates"]]
    took, cpu = time.perf_counter() - began, time.process_time() - cpu
    assert len(images) == count
    return {
        "seconds": took,
        "cpu_seconds": cpu,
        "peak_bytes": peak_memory(),
        "raw_bytes": before,
        **_timed_selection(
            lambda: [
                image
                for image in images
                if all(image.types.get(name, False) == value for name, value in _TYPES.items())
                and all(image.attributes.get(name) in values for name, values in _ATTRIBUTES.items())
            ]
        ),
    }


def _merged(raw: list[dict[str, Any]]) -> Dataset:
    """What a run does with the outputs of a converter's units."""
    dataset = Dataset(name="benchmark", zarr_dir=_ZARR_DIR)
    with collector_paused():  # as a run has it, around each batch of units that ended
        outputs = [UnitOutput(None, True, validate_output(output)) for output in raw]
    merged = merge(
        ImageList(dataset.images),
        outputs,
        task_type="converter_compound" if len(raw) > 1 else "converter_non_parallel",
        output_types={},
        zarr_dir=dataset.zarr_dir,
        selected=[],
    )
    return dataset.with_images(merged)


def _timed_selection(select: Callable[[], list[Any]]) -> dict[str, Any]:
    took = []
    for _ in range(5):
        began = time.perf_counter()
        selected = select()
        took.append(time.perf_counter() - began)
    return {"select_seconds": median(took), "selected": len(selected)}


def _raw(count: int, shape: str) -> list[dict[str, Any]]:
    """Outputs as json.loads makes them, in pieces, so that the text never counts as memory."""
    gc.disable()  # while they are made: that is not what is measured, and would take far longer
    try:
        return _loaded(count, shape)
    finally:
        gc.collect()  # old objects already when the measurement begins, as they would be in a run
        gc.enable()


def _loaded(count: int, shape: str) -> list[dict[str, Any]]:
    if shape == "each":
        return [json.loads(_text(index, index + 1)) for index in range(count)]
    updates = []
    for start in range(0, count, _CHUNK):
        updates += json.loads(_text(start, min(start + _CHUNK, count)))["image_list_updates"]
    return [{"image_list_updates": updates}]


def _text(start: int, stop: int) -> str:
    return json.dumps({"image_list_updates": [_update(index) for index in range(start, stop)]})


def _update(index: int) -> dict[str, Any]:
    well = index % _WELLS
    return {
        "zarr_url": f"{_ZARR_DIR}/plate_{index // 10_000:04d}.zarr/{well:02d}/{index:07d}",
        "origin": f"{_ZARR_DIR}/raw.zarr/{index:07d}",
        "attributes": {
            "plate": f"plate_{index // 10_000:04d}.zarr",
            "well": f"{'ABCDEFGH'[well // 12]}{well % 12 + 1:02d}",
            "cycle": index % 20,
        },
        "types": {"is_3D": index % 2 == 0},
    }
