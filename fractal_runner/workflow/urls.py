"""Where images are: the one form that a zarr_url or zarr_dir has, and what lies inside what.

Everything behind the models sees only normalised URLs, so that equality and containment are plain
comparisons.
"""

from __future__ import annotations

import posixpath

_S3 = "s3://"


def normalise_url(url: str) -> str:
    """`url` in its one form: an absolute POSIX path as posixpath.normpath has it, or an s3:// URL.

    White space is kept. A leading `//` becomes `/`; an S3 URL only loses its trailing slashes, as keys
    may contain empty components.

    Raises:
        ValueError: if it is neither, if one of its components is `..`, or if it contains a NUL.
    """
    if url[:1] == "/":
        # Nearly every URL is as it should be, and a million are looked at.
        if "/." not in url and "//" not in url and "\0" not in url and url[-1] != "/":
            return url
        _check_components(url)
        return "/" + posixpath.normpath(url).lstrip("/")
    if url.startswith(_S3):
        _check_components(url)
        place = url[len(_S3) :].rstrip("/")
        if place and not place.startswith("/"):
            return _S3 + place
        raise ValueError(f"{url!r} names no bucket: write 's3://bucket/path'")
    raise ValueError(f"{url!r} is neither an absolute path ('/data/plate.zarr') nor an S3 URL ('s3://…')")


def is_inside(url: str, directory: str) -> bool:
    """Whether `url` lies strictly inside `directory`, by path components; both are normalised."""
    if directory[-1] != "/":
        directory += "/"
    return url.startswith(directory) and len(url) > len(directory)


def _check_components(url: str) -> None:
    if ".." in url.split("/"):
        raise ValueError(f"{url!r} has '..' as a component: give the path it leads to")
    if "\0" in url:
        raise ValueError(f"{url!r} contains a NUL character, which no path can")
