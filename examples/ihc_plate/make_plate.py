"""Build a small OME-Zarr plate from a real micrograph, so that a workflow has something to work on.

The micrograph is the immunohistochemistry slide (colon tissue) that scikit-image carries in its wheel, so
nothing is downloaded. Its haematoxylin stain, which colours nuclei, is cut into tiles, and every tile
becomes a well with three focal planes.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import skimage
from ngio import ImageInWellPath, create_empty_plate, create_ome_zarr_from_array
from numpy.typing import NDArray
from skimage.color import rgb2hed
from skimage.filters import gaussian
from skimage.io import imread

Image16 = NDArray[np.uint16]

PLATE_NAME = "plate.zarr"
PLATE_METADATA = (".zgroup", "zarr.json")

TILE_ROWS, TILE_COLUMNS = 3, 4  # of the micrograph
TILE_HEIGHT, TILE_WIDTH = 170, 128  # pixels
TILES = TILE_ROWS * TILE_COLUMNS

# The usual plates, as (rows, columns): the smallest that holds the wells gives them their names.
PLATE_FORMATS = ((3, 4), (4, 6), (6, 8), (8, 12), (16, 24))
MAX_WELLS = PLATE_FORMATS[-1][0] * PLATE_FORMATS[-1][1]

# The slide does not say its scale; these make its nuclei some 8 micrometres across.
PIXEL_SIZE = 0.5  # micrometres
Z_SPACING = 2.0  # micrometres
DEFOCUS = 2.0  # pixels: sigma of the blur of the two outer planes


@dataclass(frozen=True, slots=True)
class Well:
    """Where a well is on the plate.

    Attributes:
        index: its place, from 0, in the order in which wells are filled.
        row: such as A.
        column: such as 01.
    """

    index: int
    row: str
    column: str


def micrograph_path() -> Path:
    """Where the slide is in scikit-image's own files."""
    # skimage.data would download a picture that it lacks, or take a copy from its cache.
    return Path(skimage.__file__).parent / "data" / "ihc.png"


def haematoxylin(rgb: NDArray[np.uint8]) -> Image16:
    """The haematoxylin stain of a slide, the strongest stain being 65535.

    Args:
        rgb: the slide, of shape (y, x, 3).

    Returns:
        Shape (y, x).
    """
    stain: NDArray[np.float64] = rgb2hed(rgb)[..., 0]
    return np.round(stain / stain.max() * np.iinfo(np.uint16).max).astype(np.uint16)


def focal_planes(sharp: Image16) -> Image16:
    """Three focal planes of which the middle one is in focus.

    Args:
        sharp: shape (y, x).

    Returns:
        Shape (z, y, x), with three planes.
    """
    blurred = np.round(gaussian(sharp, sigma=DEFOCUS, preserve_range=True)).astype(np.uint16)
    return np.stack([blurred, sharp, blurred])


def cut_tiles(planes: Image16) -> list[Image16]:
    """Cut a stack into tiles, row by row; the two pixel rows left at the bottom are dropped.

    Args:
        planes: shape (z, y, x).

    Returns:
        Tiles of shape (z, 170, 128).
    """
    return [
        planes[:, top : top + TILE_HEIGHT, left : left + TILE_WIDTH]
        for top in range(0, TILE_ROWS * TILE_HEIGHT, TILE_HEIGHT)
        for left in range(0, TILE_COLUMNS * TILE_WIDTH, TILE_WIDTH)
    ]


def vary(tile: Image16, variation: int) -> Image16:
    """Make another well of a tile: mirrored, and after every four variations a tenth paler.

    Neither changes which pixels are nuclei, so the counts of the first twelve wells come again.

    Args:
        tile: shape (z, y, x).
        variation: 0 for the tile itself.

    Returns:
        The same shape.
    """
    paler, flips = divmod(variation, 4)
    if flips & 1:
        tile = tile[..., ::-1]
    if flips & 2:
        tile = tile[..., ::-1, :]
    return np.round(tile * 0.9**paler).astype(np.uint16)


def plate_wells(count: int) -> Iterator[Well]:
    """The first wells of the smallest usual plate that holds them, row by row: A01, A02, ..."""
    columns = next(columns for rows, columns in PLATE_FORMATS if rows * columns >= count)
    for index in range(count):
        row, column = divmod(index, columns)
        yield Well(index, chr(ord("A") + row), f"{column + 1:02d}")


def write_plate(path: Path, count: int) -> None:
    """Write a plate, in place of the one that may be there.

    Args:
        path: the plate's directory.
        count: number of wells, at most 384.
    """
    tiles = cut_tiles(focal_planes(haematoxylin(imread(micrograph_path()))))
    wells = list(plate_wells(count))
    if path.exists():
        shutil.rmtree(path)
    create_empty_plate(
        store=str(path),
        name=path.name,
        images=[ImageInWellPath(row=well.row, column=well.column, path="0") for well in wells],
    )
    for well in wells:
        variation, tile = divmod(well.index, TILES)
        create_ome_zarr_from_array(
            store=str(path / well.row / well.column / "0"),
            array=vary(tiles[tile], variation)[np.newaxis],
            axes_names=["c", "z", "y", "x"],
            channels_meta=["H"],
            pixelsize=PIXEL_SIZE,
            z_spacing=Z_SPACING,
            levels=2,
            name=f"{well.row}{well.column}",
            overwrite=True,
        )


def well_count(text: str) -> int:
    """A number of wells, from the command line."""
    try:
        count = int(text)
    except ValueError:
        count = 0
    if not 1 <= count <= MAX_WELLS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to {MAX_WELLS}")
    return count


def problem_with(directory: Path) -> str | None:
    """What prevents writing the plate into a directory; None if nothing does."""
    plate = directory / PLATE_NAME
    if not micrograph_path().is_file():
        return f"{micrograph_path()} is missing: install scikit-image from its wheel, which carries it"
    for place in (directory, *directory.parents):
        if place.exists() and not place.is_dir():
            return f"{place} is a file: name a directory"
    if plate.exists() and not any((plate / name).is_file() for name in PLATE_METADATA):
        return f"{plate} exists and is not an OME-Zarr: move it away, or name another directory"
    return None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments, None for the process's own.

    Returns:
        Exit code: 0, or 1 if the plate cannot be written.
    """
    parser = argparse.ArgumentParser(description="Build DIR/plate.zarr, a small OME-Zarr plate.")
    parser.add_argument(
        "directory", metavar="DIR", type=Path, help="where to put plate.zarr; made if missing"
    )
    parser.add_argument(
        "--wells",
        type=well_count,
        default=TILES,
        metavar="N",
        help=f"number of wells, 1 to {MAX_WELLS} (default: %(default)s); "
        f"past {TILES}, tiles come again mirrored and paler",
    )
    options = parser.parse_args(argv)
    problem = problem_with(options.directory)
    if problem:
        print(f"{parser.prog}: error: {problem}", file=sys.stderr)
        return 1
    plate = options.directory / PLATE_NAME
    try:
        options.directory.mkdir(parents=True, exist_ok=True)
        write_plate(plate, options.wells)
    except OSError as error:
        print(f"{parser.prog}: error: {plate} cannot be written: {error}", file=sys.stderr)
        return 1
    print(f"{plate}: {options.wells} well{'' if options.wells == 1 else 's'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
