"""What jobs are to do comes out of its file as it was put in, or not at all."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fractal_runner.errors import ExecutorError
from fractal_runner.executors.batch.payload import PackedCall, Payload, Terms, write_payload

CONTEXT = pickle.dumps({})


def call(name: str = "f", arguments: bytes = b"", function: bytes = b"fn", **more: Any) -> PackedCall:
    return PackedCall(name, more.pop("key", None), function, arguments, more.pop("context", CONTEXT), **more)


def written(path: Path, slices: list[list[PackedCall]], terms: Terms | None = None) -> Payload:
    write_payload(str(path), slices, terms or Terms(), levels={"": 30})
    return Payload(str(path))


@pytest.fixture
def small(tmp_path: Path) -> Path:
    written(tmp_path / "payload", [[call("a", b"12"), call("b", b"345", key="k")], [call("c", b"6789")]])
    return tmp_path / "payload"


packed_calls = st.builds(
    PackedCall,
    name=st.text(min_size=1, max_size=20),
    key=st.none() | st.text(min_size=1, max_size=20),
    function=st.sampled_from([b"f", b"g" * 1000]) | st.binary(max_size=50),
    arguments=st.binary(max_size=300),
    context=st.just(CONTEXT) | st.binary(max_size=20),
    timeout=st.none() | st.floats(0, 1e6),
    tries=st.integers(0, 3),
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50, deadline=None)
@given(slices=st.lists(st.lists(packed_calls, min_size=1, max_size=5), min_size=1, max_size=4))
def test_calls_come_out_as_they_were_put_in(tmp_path: Path, slices: list[list[PackedCall]]) -> None:
    payload = written(tmp_path / "payload", slices)
    assert payload.count == len(slices)
    assert [[stored.packed() for stored in payload.calls(n)] for n in range(payload.count)] == slices
    assert [payload.keys(n) for n in range(payload.count)] == [[one.key for one in part] for part in slices]
    assert [payload.size(n) for n in range(payload.count)] == list(map(len, slices))


def test_terms_come_out_as_they_were_put_in(tmp_path: Path) -> None:
    terms = Terms(
        parallel=3,
        cpus=2,
        memory=10**9,
        gpus=1,
        time=90.5,
        queue="long",
        account="me",
        extra={"exclude": ["n1"]},
        job={"cpus": 6},
    )
    assert written(tmp_path / "payload", [[call()]], terms).terms == terms


def test_calls_that_need_the_same_have_equal_groups_whatever_jobs_they_were_in() -> None:
    assert (
        Terms(cpus=2, extra={"a": 1, "b": 2}).group == Terms(cpus=2, extra={"b": 2, "a": 1}, parallel=4).group
    )
    assert Terms(cpus=2).group != Terms(cpus=3).group


def test_functions_and_contexts_stand_there_once_however_many_calls_need_them(tmp_path: Path) -> None:
    function, context = os.urandom(100_000), os.urandom(100_000)
    calls = [call(f"call-{n}", b"x", bytes(bytearray(function)), context=context) for n in range(500)]
    written(tmp_path / "payload", [calls[:250], calls[250:]])
    assert (tmp_path / "payload").stat().st_size < 250_000


def test_a_job_reads_its_own_share_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    share = 100_000
    payload = written(tmp_path / "payload", [[call("f", os.urandom(share))] for _ in range(20)])
    read = []
    pread = os.pread

    def counting(fd: int, size: int, offset: int) -> bytes:
        read.append(len(data := pread(fd, size, offset)))
        return data

    monkeypatch.setattr(os, "pread", counting)
    payload.calls(7)
    assert share <= sum(read) < 1.1 * share


def test_a_function_is_unpickled_where_it_is_called(tmp_path: Path) -> None:
    packed = call("pow", pickle.dumps(((2, 5), {"mod": 7})), pickle.dumps(pow))
    (stored,) = written(tmp_path / "payload", [[packed]]).calls(0)
    fn, args, kwargs = pickle.loads(pickle.dumps(stored.bound()))
    assert fn(*args, **kwargs) == 4


def everything(path: Path) -> None:
    payload = Payload(str(path))
    for number in range(payload.count):
        for stored in payload.calls(number):
            stored.packed()


def test_whatever_is_cut_off_is_missed(small: Path) -> None:
    data = small.read_bytes()
    for size in range(len(data)):
        small.write_bytes(data[:size])
        with pytest.raises(ExecutorError, match=str(small)):
            everything(small)


def test_a_byte_that_was_changed_is_noticed_wherever_it_is(small: Path) -> None:
    data = small.read_bytes()
    for place in range(len(data)):
        small.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(ExecutorError, match=str(small)):
            everything(small)


def test_a_file_of_another_kind_is_no_payload(tmp_path: Path) -> None:
    (tmp_path / "payload").write_text("#!/bin/sh\n" * 100)
    with pytest.raises(ExecutorError, match="payload is no payload of this version"):
        Payload(str(tmp_path / "payload"))


def test_damage_of_one_share_leaves_the_others_readable(small: Path) -> None:
    data = small.read_bytes()
    small.write_bytes(data.replace(b"6789", b"6780"))
    payload = Payload(str(small))
    assert [stored.arguments for stored in payload.calls(0)] == [b"12", b"345"]
    with pytest.raises(ExecutorError, match="is damaged between bytes"):
        payload.calls(1)
