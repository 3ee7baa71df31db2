"""Filtering and merging against plain, slow models of what they mean, on whatever hypothesis thinks of."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fractal_runner.errors import JobExecutionError, TaskOutputValidationError
from fractal_runner.workflow.images import ImageList
from fractal_runner.workflow.models import Image
from fractal_runner.workflow.outputs import UnitOutput, merge, validate_output

URLS = [f"/z/{name}" for name in "abcdef"] + ["/other/x"]
NAMES = st.sampled_from(["p", "q"])
SCALARS = st.one_of(st.booleans(), st.integers(0, 2), st.sampled_from(["A", "B", ""]), st.just(1.0))
TYPES = st.dictionaries(NAMES, st.booleans(), max_size=2)
ATTRIBUTES = st.dictionaries(NAMES, SCALARS, max_size=2)
URL = st.sampled_from(URLS)
IMAGES = st.lists(
    st.builds(Image, zarr_url=URL, origin=st.none() | URL, attributes=ATTRIBUTES, types=TYPES),
    unique_by=lambda image: image.zarr_url,
    max_size=6,
)
UPDATE = st.fixed_dictionaries(
    {"zarr_url": URL},
    optional={
        "origin": st.none() | URL,
        "attributes": st.dictionaries(NAMES, st.none() | SCALARS, max_size=2),
        "types": TYPES,
    },
)
OUTPUT = st.one_of(
    st.none(),
    st.just({}),
    st.fixed_dictionaries(
        {},
        optional={
            "image_list_updates": st.lists(UPDATE, max_size=2),
            "image_list_removals": st.lists(URL, max_size=1),
        },
    ),
)


@given(IMAGES, TYPES, st.dictionaries(NAMES, st.lists(SCALARS, max_size=2), max_size=2))
def test_filters_select_what_the_rules_say(images: list[Image], types: Any, attributes: Any) -> None:
    def same(one: object, other: object) -> bool:
        return isinstance(one, bool) == isinstance(other, bool) and one == other

    expected = []
    for image in images:
        fits = True
        for name, wanted in types.items():
            if image.types.get(name, False) != wanted:
                fits = False
        for name, listed in attributes.items():
            if name not in image.attributes or not any(
                same(image.attributes[name], value) for value in listed
            ):
                fits = False
        if fits:
            expected.append(image)

    assert ImageList(images).select(types, attributes) == expected


class Invalid(Exception):
    """The model's word for outputs that contradict each other."""


class Refused(Exception):
    """The model's word for images that cannot be created or removed."""


def slow_merge(
    images: list[dict[str, Any]],
    units: list[tuple[str | None, bool, Any]],
    task_type: str,
    output_types: dict[str, bool],
    selected: list[str],
) -> list[dict[str, Any]]:
    """The rules, one after the other, on lists of plain dictionaries."""

    def updates_of(raw: Any) -> list[dict[str, Any]]:
        full = []
        for update in (raw or {}).get("image_list_updates", []):
            full.append({"origin": None, "attributes": {}, "types": {}, **update})
        return full

    def removals_of(raw: Any) -> list[str]:
        return list((raw or {}).get("image_list_removals", []))

    def is_empty(raw: Any) -> bool:
        return not updates_of(raw) and not removals_of(raw)

    def find(url: str | None) -> int | None:
        for position, image in enumerate(images):
            if image["zarr_url"] == url:
                return position
        return None

    # 1: all updates in unit order, exact duplicates dropped; contradictions are errors
    succeeded = [(url, raw) for url, ok, raw in units if ok]
    updates: list[dict[str, Any]] = []
    for _, raw in succeeded:
        for update in updates_of(raw):
            if repr(_sorted(update)) not in [repr(_sorted(other)) for other in updates]:
                updates.append(update)
    removals = {url for _, raw in succeeded for url in removals_of(raw)}
    urls = [update["zarr_url"] for update in updates]
    if len(set(urls)) < len(urls) or set(urls) & removals:
        raise Invalid
    # 2: what empty outputs stand for
    touch = {"origin": None, "attributes": {}, "types": {}}
    if task_type == "parallel":
        only_own = all(update["zarr_url"] == url for url, raw in succeeded for update in updates_of(raw))
        if only_own:
            ordered = []
            for url, raw in succeeded:
                for update in updates_of(raw):
                    if update in updates and update["zarr_url"] not in [u["zarr_url"] for u in ordered]:
                        ordered.append(update)
                if is_empty(raw) and url not in removals and url not in urls:
                    ordered.append({"zarr_url": url, **touch})
            updates = ordered
    elif not updates and not removals:
        failed = {url for url, ok, _ in units if not ok}
        if all(ok for _, ok, _ in units):
            counted = selected
        else:
            counted = [url for url in selected if url in {u for u, _ in succeeded} and url not in failed]
        updates = [{"zarr_url": url, **touch} for url in counted]
    # 3, 4: one update after the other
    images = [dict(image) for image in images]
    for update in updates:
        position = find(update["zarr_url"])
        if position is not None and update["origin"] in (None, update["zarr_url"]):
            base, origin = images[position], images[position]["origin"]
        else:
            if position is None and not update["zarr_url"].startswith("/z/"):
                raise Refused
            source = find(update["origin"])
            base = images[source] if source is not None else {"attributes": {}, "types": {}}
            origin = update["origin"]
        attributes = {**base["attributes"], **update["attributes"]}
        new = {
            "zarr_url": update["zarr_url"],
            "origin": origin,
            "attributes": {name: value for name, value in attributes.items() if value is not None},
            "types": {**base["types"], **update["types"], **output_types},
        }
        if position is None:
            images.append(new)
        else:
            images[position] = new
    # 5: removals
    for url in removals:
        if find(url) is None:
            raise Refused
        images = [image for image in images if image["zarr_url"] != url]
    return images


def _sorted(value: Any) -> Any:
    return sorted((k, _sorted(v)) for k, v in value.items()) if isinstance(value, dict) else value


def _plain(image: Image) -> dict[str, Any]:
    return {
        "zarr_url": image.zarr_url,
        "origin": image.origin,
        "attributes": image.attributes,
        "types": image.types,
    }


@settings(max_examples=1000)
@given(
    IMAGES,
    st.sampled_from(["parallel", "compound", "non_parallel", "converter_compound"]),
    TYPES,
    st.data(),
)
def test_outputs_are_merged_as_the_rules_say(
    images: list[Image], task_type: Any, output_types: dict[str, bool], data: st.DataObject
) -> None:
    selected = [] if task_type.startswith("converter") else [image.zarr_url for image in images]
    if task_type == "parallel":
        own: list[str | None] = list(selected)
    elif task_type == "non_parallel":
        own = [None]
    else:
        own = list(data.draw(st.lists(URL, max_size=3)))
    units = [(url, data.draw(st.booleans() | st.just(True)), data.draw(OUTPUT)) for url in own]

    def ours() -> list[dict[str, Any]]:
        before = ImageList(images)
        after = merge(
            before,
            [UnitOutput(url, ok, validate_output(raw) if ok else None) for url, ok, raw in units],
            task_type=task_type,
            output_types=output_types,
            zarr_dir="/z",
            selected=selected,
        )
        assert list(before) == images
        return [_plain(image) for image in after]

    try:
        expected = slow_merge([_plain(image) for image in images], units, task_type, output_types, selected)
    except Invalid:
        with pytest.raises(TaskOutputValidationError):
            ours()
    except Refused:
        with pytest.raises(JobExecutionError):
            ours()
    else:
        assert ours() == expected
