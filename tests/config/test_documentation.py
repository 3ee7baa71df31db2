"""The configurations that the documentation shows are right."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fractal_runner import config
from tests.config.conftest import SECTIONS

PAGE = Path(__file__).parent.parent.parent / "docs" / "configuration.md"
BLOCKS = re.findall(r"^```yaml\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("text", BLOCKS)
def test_a_configuration_on_the_page_has_no_mistakes(tmp_path: Path, text: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(text)

    assert config.check(SECTIONS, file) == []


def test_the_page_shows_one_for_each_of_three_set_ups() -> None:
    executors = [re.search(r"^executor: (\w+)", text, re.MULTILINE) for text in BLOCKS]

    assert [found[1] for found in executors if found] == ["slurm", "process", "slurm", "lsf"]
