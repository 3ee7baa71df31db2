"""The server of the stage that comes next, started beside that of this one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fractal_runner.worker import processes
from fractal_runner.worker.command import run_unit
from fractal_runner.worker.spec import WARM, Ahead
from tests.worker.pairs import Bench, until
from tests.worker.site import Background, Site, Worker, ways, well

NEXT = "1_t-par"


@pytest.fixture
def site(bench: Bench, spec: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    with Site(bench, spec, monkeypatch) as site:
        yield site


def ahead(site: Site, words: list[str]) -> Ahead:
    return Ahead(tuple(words), NEXT, 30.0, f"{site.terms.log}-next")


@pytest.mark.parametrize("where", ["here", "in a worker that stays"])
def test_it_is_there_when_its_units_come(site: Site, where: str, tmp_path: Path) -> None:
    words, later = site.quick(), site.quick("later.py")
    terms = {"ahead": ahead(site, later)}
    if where == "here":
        first = run_unit(site.spec(words, terms=terms))
        until(lambda: len(site.links) == 2)
    else:  # it has ended by then, and does not wait for what it has begun
        slow = site.bench.script("import heavy, time\ntime.sleep(1)\n", name="slow.py")
        [first] = Worker(tmp_path, site.spec(slow, terms=terms)).results()
    servers = {link.pid for link in site.links}
    site.station.end_servers(keep=NEXT)
    kept = site.server
    second = run_unit(site.spec(later, terms={"stage": NEXT}))

    assert well([first, second])
    assert ways([first, second]) == [WARM]
    assert (kept.stage, kept.pid in servers, site.server) == (NEXT, True, kept)
    assert sorted(site.imports) == sorted(servers)


def test_its_units_wait_for_it_instead_of_starting_another(site: Site) -> None:
    words, later = site.quick(), site.quick("later.py", more="import slow_too\n")
    site.bench.write("slow_too.py", "import time\ntime.sleep(1)\n")
    first = run_unit(site.spec(words, terms={"ahead": ahead(site, later)}))
    with Background() as background:
        results = background.run_all([site.spec(later, terms={"stage": NEXT}) for _ in range(8)])

    assert well([first, *results])
    assert ways([first, *results]) == [WARM]
    assert len(site.imports) == 2


def test_it_ends_with_the_stages_if_its_units_do_not_come(site: Site) -> None:
    words, later = site.quick(), site.quick("later.py")
    assert run_unit(site.spec(words, terms={"ahead": ahead(site, later)})).start == WARM
    until(lambda: len(site.links) == 2)
    site.station.end_servers(keep="2_t-par")

    assert site.links == []
    until(lambda: site.left() == [])


@pytest.mark.parametrize("ending", ["end_servers", "remove"])
def test_it_ends_while_it_still_imports(site: Site, ending: str) -> None:
    words, later = site.quick(), site.quick("later.py", more="import for_ever\n")
    site.bench.write("for_ever.py", "import time\ntime.sleep(600)\n")
    assert run_unit(site.spec(words, terms={"ahead": ahead(site, later)})).start == WARM
    until(lambda: len(site.imports) == 2)
    getattr(site.station, ending)()

    until(lambda: site.left() == [])
    assert not any(name.endswith(".json") for name in site.files())


def test_it_ends_with_the_worker_that_has_begun_it(site: Site, tmp_path: Path) -> None:
    words, later = site.quick(), site.quick("later.py", more="import for_ever\n")
    site.bench.write("for_ever.py", "import time\ntime.sleep(600)\n")
    [first] = Worker(tmp_path, site.spec(words, terms={"ahead": ahead(site, later)})).results()

    assert first.start == WARM
    until(lambda: len([pid for pid in site.left() if processes.is_running(pid)]) == 1)


@pytest.mark.parametrize(
    ("name", "most"), [("later.py", 1), ("quick.py", 4)], ids=["one too many", "the same command"]
)
def test_there_is_none_where_there_would_be(site: Site, name: str, most: int) -> None:
    words, later = site.quick(), site.quick(name)
    assert run_unit(site.spec(words, terms={"ahead": ahead(site, later), "most": most})).start == WARM
    site.station.end_servers(keep=NEXT)

    assert len(site.imports) == 1
    assert site.links == []


@pytest.mark.parametrize("wrong", ["fails", "is no script"])
def test_what_is_wrong_with_it_is_its_own_units_matter(site: Site, wrong: str) -> None:
    words = site.quick()
    later = site.bench.script("import sys\nimport not_here\n", name="later.py")
    if wrong == "is no script":
        later = ["sh", "-c", "exit 1"]
    first = run_unit(site.spec(words, terms={"ahead": ahead(site, later)}))
    site.station.end_servers(keep=NEXT)
    second = run_unit(site.spec(later, terms={"stage": NEXT}))

    assert well([first])
    assert (second.returncode, second.start) == (1, "cold")
    assert second.why_cold == (
        ""
        if wrong == "is no script"
        else "Its imports fail (ModuleNotFoundError: No module named 'not_here')."
    )
