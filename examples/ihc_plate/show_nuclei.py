"""Show what the workflow found: how many nuclei each well has, as a table and as a picture of the plate.

Reads the dataset that a run leaves behind, takes its projected images, and of each the feature table and
the labels that the last two tasks wrote.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure
from ngio import OmeZarrContainer, open_ome_zarr_container
from ngio.utils import NgioError
from numpy.typing import NDArray
from skimage.segmentation import find_boundaries

FEATURE_TABLE = "region_props_features"  # the name that Measure Features gives by default
AGAIN = "run the workflow again, and see in its log whether"

WELL_NAME = re.compile(r"([A-Z])0*([1-9]\d*)")

# The stain as it looks under the microscope: nuclei dark violet on a pale ground.
STAIN = LinearSegmentedColormap.from_list("haematoxylin", ["#fbf9fd", "#c9bfe6", "#7d6bb8", "#2f2460"])
OUTLINE = "#ff7a00"
INK = "#33304a"
FAINT = "#8a879b"

PICTURE_WIDTH = 1500  # pixels: wells are enlarged, by a whole number, to come near it
MAX_ENLARGEMENT = 3
GAP = 14  # pixels between wells
MARGIN = 40  # pixels round the plate, for the names of rows and columns
CAPTION = 24  # pixels under a well, for its name and count
TITLE = 44  # pixels
DPI = 100


class ShowError(Exception):
    """Something that the user can put right; its message says what."""


@dataclass(frozen=True, slots=True)
class Well:
    """What the workflow found in one well.

    Attributes:
        row: index of the row, 0 for A.
        column: index of the column, 0 for 1.
        image: the projected stain, of shape (y, x).
        labels: the nuclei, numbered from 1, of the same shape.
        areas: area of every nucleus, in square micrometres.
    """

    row: int
    column: int
    image: NDArray[np.uint16]
    labels: NDArray[np.integer[Any]]
    areas: NDArray[np.float64]

    @property
    def name(self) -> str:
        """Its name, such as A01."""
        return f"{row_name(self.row)}{self.column + 1:02d}"

    @property
    def nuclei(self) -> int:
        """The number of nuclei."""
        return len(self.areas)


def row_name(row: int) -> str:
    """The letter of a row, A for 0."""
    return chr(ord("A") + row)


def read_projections(path: Path) -> list[dict[str, Any]]:
    """The projected images of a dataset.

    Args:
        path: the dataset's file.

    Returns:
        Its images that are not three-dimensional; at least one.
    """
    try:
        dataset = json.loads(path.read_text(encoding="utf-8"))
        images = dataset["images"]
        projections = [image for image in images if image["types"].get("is_3D") is False]
    except FileNotFoundError:
        raise ShowError(
            f"{path}: no such file; run the workflow, and name the dataset that it wrote"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ShowError(f"{path} cannot be read: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ShowError(
            f"{path} is not a dataset: name the dataset.json that the workflow's run wrote"
        ) from error
    if not projections:
        raise ShowError(
            f"{path} has no projected image among its {len(images)}; "
            f"{AGAIN} Project Image (HCS Plate) finished"
        )
    return projections


def read_well(image: dict[str, Any]) -> Well:
    """Read what the workflow wrote of one image.

    Args:
        image: an image of the dataset, with zarr_url and attributes.

    Returns:
        The well.
    """
    url = image["zarr_url"]
    match = WELL_NAME.fullmatch(str(image.get("attributes", {}).get("well")))
    if not match:
        raise ShowError(
            f"{url}: the image's attributes do not name its well; {AGAIN} Import OME-Zarr finished"
        )
    container = open_image(url)
    if FEATURE_TABLE not in container.list_tables():
        raise ShowError(f"{url} has no table {FEATURE_TABLE}; {AGAIN} Measure Features finished")
    table = container.get_feature_table(FEATURE_TABLE)
    label = table.reference_label
    if label is None or label not in container.list_labels():
        raise ShowError(
            f"{url} has no label {label}, of which its table speaks; {AGAIN} Threshold Segmentation finished"
        )
    return Well(
        row=ord(match[1]) - ord("A"),
        column=int(match[2]) - 1,
        image=container.get_image().get_as_numpy(c=0, z=0, axes_order=["y", "x"]),
        labels=container.get_label(label).get_as_numpy(z=0, axes_order=["y", "x"]),
        areas=table.dataframe["area"].to_numpy(dtype=float),
    )


def open_image(url: str) -> OmeZarrContainer:
    """Open an image of the dataset for reading."""
    if not Path(url).is_dir():
        raise ShowError(
            f"{url}: no such image; was the dataset's zarr_dir moved or emptied? Run the workflow again"
        )
    try:
        return open_ome_zarr_container(url, mode="r")
    except (NgioError, OSError) as error:
        raise ShowError(f"{url} is not an OME-Zarr image ({error}); run the workflow again") from error


def read_wells(images: Iterable[dict[str, Any]]) -> list[Well]:
    """Read the wells of the images, in the plate's order."""
    wells: dict[str, Well] = {}
    for image in images:
        well = read_well(image)
        if well.name in wells:
            raise ShowError(
                f"{image['zarr_url']}: well {well.name} is in the dataset twice; only one plate is shown"
            )
        wells[well.name] = well
    return sorted(wells.values(), key=lambda well: (well.row, well.column))


def format_table(wells: Sequence[Well]) -> str:
    """The number of nuclei in each well, laid out as the plate, and in all."""
    columns = max(well.column for well in wells) + 1
    counts = {(well.row, well.column): str(well.nuclei) for well in wells}
    lines = ["    " + "".join(f"{column + 1:>5}" for column in range(columns))]
    for row in range(max(well.row for well in wells) + 1):
        cells = (counts.get((row, column), "-") for column in range(columns))
        lines.append(f"{row_name(row):>4}" + "".join(f"{cell:>5}" for cell in cells))
    return "\n".join(["Nuclei per well", "", *lines, "", summary(wells)])


def summary(wells: Sequence[Well]) -> str:
    """One line on the whole plate: nuclei, wells and the median area."""
    areas = np.concatenate([well.areas for well in wells])
    line = f"{len(areas)} nuclei in {len(wells)} well{'' if len(wells) == 1 else 's'}"
    return f"{line}, median area {np.median(areas):.0f} µm²" if len(areas) else line


def colour(well: Well, darkest: float, enlargement: int) -> NDArray[np.float64]:
    """A well in colour, its nuclei outlined.

    Args:
        well: the well.
        darkest: the stain that is drawn darkest, in the image's units.
        enlargement: how many pixels of the picture, along y and x, a pixel of the image becomes.

    Returns:
        Red, green and blue from 0 to 1, of shape (y, x, 3).
    """
    # Labels are enlarged before they are outlined, which keeps the line thin.
    square = np.ones((enlargement, enlargement), dtype=well.labels.dtype)
    picture = np.kron(STAIN(np.clip(well.image / darkest, 0, 1))[..., :3], square[..., np.newaxis])
    line = "thick" if enlargement > 1 else "inner"
    picture[find_boundaries(np.kron(well.labels, square), mode=line)] = to_rgb(OUTLINE)
    return picture


def draw_plate(wells: Sequence[Well]) -> Figure:
    """Draw the wells in the plate's layout, with outlines, names and counts."""
    rows = max(well.row for well in wells) + 1
    columns = max(well.column for well in wells) + 1
    height, width = np.max([well.image.shape for well in wells], axis=0)
    enlargement = int(np.clip(round(PICTURE_WIDTH / (columns * width)), 1, MAX_ENLARGEMENT))
    step_y, step_x = height * enlargement + CAPTION + GAP, width * enlargement + GAP
    canvas = np.ones((TITLE + MARGIN + rows * step_y, 2 * MARGIN + columns * step_x - GAP, 3))
    figure = Figure(figsize=(canvas.shape[1] / DPI, canvas.shape[0] / DPI), dpi=DPI)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    # One scale for the plate, as wells are to be compared.
    darkest = float(np.percentile(np.concatenate([well.image.ravel() for well in wells]), 99.8)) or 1.0
    for well in wells:
        top, left = TITLE + MARGIN + well.row * step_y, MARGIN + well.column * step_x
        picture = colour(well, darkest, enlargement)
        bottom, right = top + picture.shape[0], left + picture.shape[1]
        canvas[top:bottom, left:right] = picture
        axes.text(left, bottom + 4, well.name, va="top", color=INK, size=10, weight="bold")
        axes.text(
            right, bottom + 4, str(well.nuclei), va="top", ha="right", color=OUTLINE, size=10, weight="bold"
        )
    for column in range(columns):
        middle = MARGIN + column * step_x + width * enlargement / 2
        axes.text(middle, TITLE + MARGIN - 8, str(column + 1), ha="center", color=FAINT, size=11)
    for row in range(rows):
        middle = TITLE + MARGIN + row * step_y + height * enlargement / 2
        axes.text(MARGIN / 2, middle, row_name(row), ha="center", va="center", color=FAINT, size=11)
    axes.text(MARGIN, TITLE - 8, summary(wells), color=INK, size=13)
    axes.imshow(canvas, interpolation="nearest", aspect="auto")
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments, None for the process's own.

    Returns:
        Exit code: 0, or 1 if something is missing.
    """
    parser = argparse.ArgumentParser(description="Count the nuclei of each well, and draw the plate.")
    parser.add_argument(
        "dataset", metavar="DATASET_OUT.json", type=Path, help="the dataset that the run wrote"
    )
    parser.add_argument("picture", metavar="PICTURE.png", type=Path, help="the picture to write")
    options = parser.parse_args(argv)
    mpl.use("Agg")
    try:
        wells = read_wells(read_projections(options.dataset))
        print(format_table(wells))
        save(draw_plate(wells), options.picture)
    except ShowError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 1
    return 0


def save(figure: Figure, path: Path) -> None:
    """Write the picture as PNG."""
    try:
        figure.savefig(path, format="png")
    except OSError as error:
        raise ShowError(f"{path} cannot be written: {error}") from error


if __name__ == "__main__":
    sys.exit(main())
