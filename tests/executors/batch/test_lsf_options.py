"""What a call may say to LSF is taken, or refused with words that help; requirements become one text."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from fractal_runner.executors.batch.lsf_options import OPTIONS, hosts_of, requirement

ALTERNATIVES = "{select[type==X] rusage[mem=5]} || {select[type==Y]}"
COMPOUND = "1*{select[bigmem] rusage[mem=9]} + 3*{span[ptile=1]}"
SECTIONS = ("select", "order", "rusage", "span", "same", "cu", "affinity")


def balances(text: str) -> bool:
    depth = 0
    for sign in re.findall(r"[\[\]]", text):
        depth += 1 if sign == "[" else -1
        if depth < 0:
            return False
    return depth == 0


# What is taken.


TAKEN: list[tuple[str, Any, Any]] = [
    ("bsub_extra", ["-app", "chem"], ("-app", "chem")),
    ("bsub_extra", ["-G", "team", "-sla", "a b;c"], ("-G", "team", "-sla", "a b;c")),
    ("env", {"A": 5, "B_": " x y "}, {"A": "5", "B_": "x y"}),
    ("exclude", "n1,n2", ("n1", "n2")),
    ("exclude", ["n1", " n2 "], ("n1", "n2")),
    ("needs_gpu", True, True),
    ("nodelist", ["n1", "n2"], ("n1", "n2")),
    ("pre_submission_commands", ["module load x", "\tindented"], ("module load x", "\tindented")),
    ("resource_requirements", "select[a]", ("select[a]",)),
    ("resource_requirements", ["select[a]", " ", "rusage[b=1]"], ("select[a]", "rusage[b=1]")),
    ("setup", ["  x"], ("  x",)),
    ("teardown", ["x", "y"], ("x", "y")),
    ("user_local_exports", {"A": "$(x)"}, {"A": "$(x)"}),
]


@pytest.mark.parametrize(("option", "value", "parsed"), TAKEN)
def test_each_option_is_parsed(option: str, value: Any, parsed: Any) -> None:
    known = OPTIONS.parse({option: value})
    assert known == {option: parsed}
    assert OPTIONS.parse(known) == known


def test_no_option_is_left_out_of_these() -> None:
    assert {option for option, _, _ in TAKEN} == OPTIONS.parsers.keys()


def test_options_that_say_nothing_are_left_out() -> None:
    nothing = {"bsub_extra": [], "env": {}, "needs_gpu": False, "resource_requirements": " ", "setup": None}
    assert OPTIONS.parse(nothing) == {}


# What is refused.


@pytest.mark.parametrize(
    ("extra", "error", "message"),
    [
        ({"resource_requirement": "x"}, TypeError, "did you mean 'resource_requirements'"),
        ({"bsub_extras": []}, TypeError, "LSF's executor has no option 'bsub_extras': did you mean 'bsub_ex"),
        ({"partition": "x"}, TypeError, "no option 'partition': a call says it by `queue`"),
        ({"project": "x"}, TypeError, "a call says it by `account`"),
        ({"walltime": 5}, TypeError, "a call says it by `time`"),
        ({"cores": 5}, TypeError, "a call says it by `cpus`"),
        ({"mem": 5}, TypeError, "a call says it by `memory`"),
        ({"zzz": 5}, TypeError, "known are 'bsub_extra', 'env', "),
        (
            {"bsub_extra": "-app 'chem"},
            ValueError,
            'bsub_extra: "-app \'chem" cannot be taken apart: No closing',
        ),
        ({"bsub_extra": ["-sp 10"]}, ValueError, r"bsub_extra: '-sp 10' is two words: write \["),
        ({"setup": "module load x"}, ValueError, r"setup: 'module load x' is not a list of lines: write \["),
        (
            {"resource_requirements": ["a", "{b} || {c}"]},
            ValueError,
            r"resource_requirements: alternatives, .* go with no other",
        ),
        ({"bsub_extra": ["chem"]}, ValueError, "'chem' is no option: bsub would take it for the command"),
        ({"bsub_extra": [""]}, ValueError, "'' is no option"),
        ({"bsub_extra": [" -J", "x"]}, ValueError, "' -J' is no option"),
        ({"bsub_extra": ["-app", 5]}, ValueError, "bsub_extra: 5 is not a line of text"),
        ({"bsub_extra": ["-app", "a\nb"]}, ValueError, r"'a\\nb' is not a line of text"),
        ({"bsub_extra": ["-app", "a\0b"]}, ValueError, "is not a line of text"),
        ({"env": ["A=5"]}, ValueError, r"env: \['A=5'\] is not a mapping of variables to values"),
        ({"env": {"A-B": "x"}}, ValueError, "env: 'A-B' is not the name of a variable"),
        ({"env": {"A;id": "x"}}, ValueError, "'A;id' is not the name of a variable"),
        ({"env": {"": "x"}}, ValueError, "'' is not the name of a variable"),
        ({"env": {"A\n": "x"}}, ValueError, "is not the name of a variable"),
        ({"env": {"A": "x\ny"}}, ValueError, r"'x\\ny' is not a line of text"),
        ({"user_local_exports": {5: "x"}}, ValueError, "user_local_exports: 5 is not the name"),
        ({"exclude": 5}, ValueError, "exclude: 5 is not a line of text"),
        ({"nodelist": ["n1", None]}, ValueError, "nodelist: None is not a line of text"),
        ({"nodelist": "n1\nn2"}, ValueError, "is not a line of text"),
        ({"needs_gpu": 1}, ValueError, "needs_gpu: 1 is neither True nor False"),
        ({"setup": "x"}, ValueError, "setup: 'x' is not a list of lines"),
        ({"teardown": ["x\ny"]}, ValueError, r"teardown: 'x\\ny' is not a line of text"),
        ({"pre_submission_commands": {"x": 1}}, ValueError, "is not a list of lines"),
        ({"resource_requirements": "select[a"}, ValueError, r"'select\[a' has brackets that do not match"),
        (
            {"resource_requirements": ["a]", "[b"]},
            ValueError,
            r"resource_requirements: 'a\]' has brackets that do not",
        ),
        ({"resource_requirements": "a\nb"}, ValueError, "is not a line of text"),
        ({"resource_requirements": 5}, ValueError, "5 is not a line of text"),
    ],
)
def test_mistakes_in_options(extra: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        OPTIONS.parse(extra)


@pytest.mark.parametrize(
    ("word", "instead"),
    [
        ("-J", "found by its name"),
        *((word, "in its log") for word in ("-o", "-oo", "-e", "-eo")),
        *((word, "reads nothing") for word in ("-i", "-is")),
        *((word, "terminal") for word in ("-I", "-Ip", "-Is")),
        ("-K", "would wait"),
        *((word, "submit nothing") for word in ("-h", "-V")),
        ("-pack", "read others"),
        ("-q", "by `queue`"),
        ("-P", "by `project`"),
        ("-W", "by `walltime`"),
        ("-n", "by `cores`"),
        ("-M", "by `memory`"),
        ("-R", "by `resource_requirements`"),
        ("-r", "by `rerunnable`"),
    ],
)
@pytest.mark.parametrize("before", [[], ["-app", "chem"]], ids=["first", "later"])
def test_words_of_bsub_that_are_the_executors_own(word: str, instead: str, before: list[str]) -> None:
    with pytest.raises(ValueError, match=rf"bsub_extra: '{word}' is the executor's own to say: .*{instead}"):
        OPTIONS.parse({"bsub_extra": [*before, word, "x"]})


@pytest.mark.parametrize("word", ["-Jd", "-app", "-G", "-w", "-x", "-H", "-N", "-u", "-gpu", "-env", "-m"])
def test_other_words_of_bsub_are_the_sites_and_the_users(word: str) -> None:
    assert OPTIONS.parse({"bsub_extra": [word]})["bsub_extra"] == (word,)


# A call's own, and the defaults.


@pytest.mark.parametrize(
    ("option", "default", "own", "merged"),
    [
        ("bsub_extra", ["-app", "a"], ["-app", "b"], ("-app", "a", "-app", "b")),
        ("exclude", "n1", "n2", ("n1", "n2")),
        ("resource_requirements", "select[a]", "rusage[b=1]", ("select[a]", "rusage[b=1]")),
        ("setup", ["a"], ["b"], ("a", "b")),
        ("teardown", ["a"], ["b"], ("b", "a")),
        ("env", {"A": "1", "B": "1"}, {"B": "2", "C": "2"}, {"A": "1", "B": "2", "C": "2"}),
        ("nodelist", "n1", "n2", ("n2",)),
    ],
)
def test_a_calls_own_goes_with_the_default(option: str, default: Any, own: Any, merged: Any) -> None:
    together = OPTIONS.merge(OPTIONS.parse({option: default}), OPTIONS.parse({option: own}))
    assert together == {option: merged}


def test_what_only_one_of_them_says_counts() -> None:
    defaults, own = OPTIONS.parse({"setup": ["a"], "exclude": "n1"}), OPTIONS.parse({"nodelist": "n2"})
    assert OPTIONS.merge(defaults, own) == {"setup": ("a",), "exclude": ("n1",), "nodelist": ("n2",)}
    assert defaults == {"setup": ("a",), "exclude": ("n1",)}


# One text of all requirements.


@pytest.mark.parametrize(
    ("own", "more", "text"),
    [
        ([], {}, "span[hosts=1]"),
        ([], {"memory": 100}, "rusage[mem=100] span[hosts=1]"),
        (["select[a]"], {"memory": 100}, "select[a] rusage[mem=100] span[hosts=1]"),
        (["select[a] rusage[x=1]"], {"memory": 9}, "select[a] rusage[mem=9,x=1] span[hosts=1]"),
        (["rusage[mem=7]"], {"memory": 9}, "rusage[mem=7] span[hosts=1]"),
        (
            ["rusage[x=1, mem = 7 :duration=2h]"],
            {"memory": 9},
            "rusage[x=1, mem = 7 :duration=2h] span[hosts=1]",
        ),
        (["rusage[max_mem=7]"], {"memory": 9}, "rusage[mem=9,max_mem=7] span[hosts=1]"),
        (["select[mem>7]"], {"memory": 9}, "select[mem>7] rusage[mem=9] span[hosts=1]"),
        (["rusage[x=1]", "rusage[y=2]"], {}, "rusage[x=1,y=2] span[hosts=1]"),
        (["select[a||b]", "select[c]"], {}, "select[(a||b) && (c)] span[hosts=1]"),
        (["mem>5"], {}, "select[mem>5] span[hosts=1]"),
        (["type==A || type==B"], {"memory": 9}, "select[type==A || type==B] rusage[mem=9] span[hosts=1]"),
        (["a  order[ut]"], {}, "select[a] order[ut] span[hosts=1]"),
        (["a", "b"], {}, "select[(a) && (b)] span[hosts=1]"),
        (["span[ptile=2]"], {}, "span[ptile=2]"),
        (["span[ptile=2]", "span[hosts=1]"], {}, "span[hosts=1]"),
        (["order[ut]", "order[mem]"], {}, "order[mem] span[hosts=1]"),
        (["select [ a ]"], {}, "select[a] span[hosts=1]"),
        (["select[a]order[b]"], {}, "select[a] order[b] span[hosts=1]"),
        (
            [
                "affinity[core(2,same=socket)] cu[type=rack] same[model]",
                "span[hosts=2] rusage[x=1] order[ut] select[a]",
            ],
            {},
            "select[a] order[ut] rusage[x=1] span[hosts=2] same[model] cu[type=rack] "
            "affinity[core(2,same=socket)]",
        ),
        ([], {"excluded": ["n1"]}, "select[hname!=n1] span[hosts=1]"),
        (
            [],
            {"excluded": ["n1", "n2", "n3", "n4"]},
            "select[(hname!=n1) && (hname!=n2) && (hname!=n3) && (hname!=n4)] span[hosts=1]",
        ),
        ([], {"excluded": ["n-1.site.org"]}, "select[hname!='n-1.site.org'] span[hosts=1]"),
        ([], {"excluded": ["ñ1"]}, "select[hname!='ñ1'] span[hosts=1]"),
        (["select[a||b]"], {"excluded": ["n1"]}, "select[(a||b) && (hname!=n1)] span[hosts=1]"),
        (["select[a||b]"], {"excluded": []}, "select[a||b] span[hosts=1]"),
    ],
)
def test_requirements_become_one_text(own: list[str], more: dict[str, Any], text: str) -> None:
    assert requirement(own, **more) == text


@pytest.mark.parametrize("text", [ALTERNATIVES, COMPOUND])
def test_alternatives_are_taken_as_they_are(text: str) -> None:
    assert requirement([text], excluded=["n1"], memory=5) == text
    assert requirement(["rusage[x=1]", text], memory=5) == text


@pytest.mark.parametrize(
    ("own", "cpus", "hosts"),
    [
        ([], 8, 1),
        (["span[hosts=1]"], 8, 1),
        (["span[ptile=8]"], 8, 1),
        (["span[ptile=4]"], 8, 2),
        (["select[a]", "rusage[x=1] span[ ptile = 3 ]"], 8, 3),
        (["span[ptile=1]"], 8, 8),
        (["span[ptile=16]"], 8, 1),
        (["span[ptile=0]"], 8, 1),
        (["span[ptile='!']"], 8, 1),
    ],
)
def test_over_how_many_hosts_a_job_is_spread(own: list[str], cpus: int, hosts: int) -> None:
    assert hosts_of(own, cpus) == hosts


def test_hosts_to_have_are_taken_apart() -> None:
    assert OPTIONS.parse({"nodelist": ["n1,n2", "n3 n4", ","]})["nodelist"] == ("n1", "n2", "n3", "n4")
    assert OPTIONS.parse({"nodelist": ","}) == {}


# Whatever comes in.

_CONTENT = st.text(alphabet="abm19 <>=!&|(),:'\".-*+{}", max_size=12)
_SECTION = st.builds("{}[{}]".format, st.sampled_from(SECTIONS), _CONTENT)
_TEXT = st.lists(st.one_of(_SECTION, _CONTENT, st.sampled_from(SECTIONS)), max_size=4).map(" ".join)
_HOSTS = st.lists(st.text(alphabet="abn019-._, ", max_size=9), max_size=3)


@given(st.lists(_TEXT, max_size=3), _HOSTS, st.one_of(st.none(), st.integers(1, 10**9)), st.integers(1, 64))
def test_whatever_is_required_its_brackets_balance(
    texts: list[str], hosts: list[str], memory: int | None, cpus: int
) -> None:
    assume(sum(map(bool, map(str.strip, texts))) < 2 or not any("{" in text for text in texts))
    own = OPTIONS.parse({"resource_requirements": texts}).get("resource_requirements", ())
    excluded = OPTIONS.parse({"exclude": hosts}).get("exclude", ())
    made = requirement(own, excluded=excluded, memory=memory)
    assert made
    assert made.isprintable()
    assert balances(made)
    assert hosts_of(own, cpus) >= 1


@given(
    st.lists(
        st.builds(
            "{}[{}]".format, st.sampled_from(SECTIONS), st.text(alphabet="abm19 <>=!&(),:'", min_size=1)
        ),
        min_size=1,
        max_size=5,
    ),
    st.one_of(st.none(), st.integers(1, 10**9)),
)
def test_whatever_is_required_is_in_the_text(texts: list[str], memory: int | None) -> None:
    made = requirement(texts, memory=memory)
    given_last = {text.partition("[")[0]: text for text in texts}
    for text in texts:
        name, _, content = text.rstrip("]").partition("[")
        if name in ("select", "rusage") or given_last[name] == text:
            assert content.strip() in made
    assert [name for name in SECTIONS if f"{name}[" in made] == re.findall(r"\b([a-z]+)\[", made)


@given(st.text(max_size=30))
def test_no_text_of_a_user_is_more_than_a_line_or_less_than_an_error(text: str) -> None:
    for option in ("resource_requirements", "exclude", "nodelist"):
        try:
            parsed = OPTIONS.parse({option: text}).get(option, ())
        except ValueError:
            continue
        assert all(line.isprintable() for line in parsed)
