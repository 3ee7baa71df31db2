"""The image list: in order, found by zarr_url, filtered by types and attributes.

One dictionary by zarr_url is both the order and the index: replacing a value keeps its place, a new one
goes to the end. Images are immutable, so a copy of the list is as good as a deep one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from fractal_runner.workflow.models import Image, Scalar

TypeFilters = Mapping[str, bool]
AttributeFilters = Mapping[str, Sequence[Scalar]]

_ABSENT = object()


class ImageList:
    """Images by zarr_url, in the order in which they came."""

    def __init__(self, images: Iterable[Image] = ()) -> None:
        self._images = {image.zarr_url: image for image in images}

    def __len__(self) -> int:
        return len(self._images)

    def __iter__(self) -> Iterator[Image]:
        return iter(self._images.values())

    def __contains__(self, zarr_url: str) -> bool:
        return zarr_url in self._images

    def get(self, zarr_url: str) -> Image | None:
        return self._images.get(zarr_url)

    def by_url(self) -> dict[str, Image]:
        """The images by zarr_url, in order: a dictionary of the caller's own."""
        return self._images.copy()

    @classmethod
    def of(cls, images: dict[str, Image]) -> ImageList:
        """The list of these images by zarr_url; the dictionary becomes the list's own."""
        made = cls()
        made._images = images
        return made

    def select(self, types: TypeFilters, attributes: AttributeFilters) -> list[Image]:
        """The images that match all filters, in order.

        Args:
            types: an image matches if each of its types is as given; one it does not have is False.
            attributes: it matches if the value of each of its attributes is among those listed; one it
                does not have never is. `True` is not 1.
        """
        wanted_types = list(types.items())
        wanted_attributes = [
            (name, {_distinct(value) for value in values}) for name, values in attributes.items()
        ]
        return [
            image
            for image in self._images.values()
            if all(image.types.get(name, False) == value for name, value in wanted_types)
            and all(
                _distinct(image.attributes.get(name, _ABSENT)) in values for name, values in wanted_attributes
            )
        ]


def _distinct(value: object) -> tuple[bool, object]:
    """A key under which True and 1 differ, as they do in JSON, and 1 and 1.0 do not."""
    return isinstance(value, bool), value
