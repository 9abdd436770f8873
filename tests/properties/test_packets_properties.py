"""For any bytes a packet's reader gives a packet or a PacketError, and nothing else."""

import json
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import packet_samples as samples
from polyrank.aggregation import Update
from polyrank.algebra import Adapter, Dense, LowRank, Sparse
from polyrank.errors import PacketError
from polyrank.evaluation.evaluator import EvaluateQuery
from polyrank.planning import CutPoint
from polyrank.protocol.client_info import read_node_info, write_node_info
from polyrank.protocol.evaluate import (
    EvaluateRequest,
    read_client_metrics,
    read_evaluate_request,
    write_client_metrics,
    write_evaluate_request,
)
from polyrank.protocol.size_limits import SizeLimits
from polyrank.protocol.train_request import read_train_request, write_train_request
from polyrank.protocol.train_result import read_train_result, write_train_result
from polyrank.rounds.messages import Failure

SENT = samples.assignment()
PACKETS = {
    "answer": write_train_result(samples.update_to(SENT)),
    "lean": write_train_result(samples.update_to(SENT), SENT),
    "failure": write_train_result(Failure("c0", 3, 1, "why", {"wire_up": 4})),
    "order": write_train_request(samples.train_request(CutPoint(1, 3))),
    "profile": write_node_info(samples.node_info()),
    "exam": write_evaluate_request(samples.evaluate_request()),
    "marks": write_client_metrics(samples.client_metrics()),
}
READERS = {
    "answer": lambda data: read_train_result(data, SizeLimits.of(SENT)),
    "lean": lambda data: read_train_result(data, SizeLimits.of(SENT), SENT),
    "failure": lambda data: read_train_result(data, SizeLimits.of(SENT), SENT),
    "order": read_train_request,
    "profile": read_node_info,
    "exam": read_evaluate_request,
    "marks": lambda data: read_client_metrics(data, samples.evaluate_request()),
}
KINDS = sorted(PACKETS)


def survives(kind, data):
    """Read; whether it was refused."""
    told = None
    try:
        READERS[kind](data)
    except PacketError as error:
        told = str(error)
    assert told is None or (" packet" in told and len(told) < 2000)
    return told is not None


@given(st.sampled_from(KINDS), st.binary(max_size=400))
def test_any_bytes_are_refused(kind, data):
    assert survives(kind, data)
    assert survives(kind, len(data).to_bytes(8, "little") + data)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([2**63, -1, 2**31, 10**400, 0, "b", "", "c0", "nan", "F32", "\ud800"]),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4)
    ),
    max_leaves=6,
)


def paths(value, at=()):
    """All places within a JSON value."""
    yield at
    inside = value if isinstance(value, (dict, list)) else ()
    for key, inner in inside.items() if isinstance(inside, dict) else enumerate(inside):
        yield from paths(inner, (*at, key))


def put(value, at, new):
    """Replace what is at a place."""
    if not at:
        return new
    value[at[0]] = put(value[at[0]], at[1:], new)
    return value


@settings(max_examples=400)
@given(st.data(), st.sampled_from(KINDS), JSON)
def test_any_json_in_the_place_of_any_value_is_read_or_refused(data, kind, new):
    header, found, rest = samples.opened(PACKETS[kind])
    whole = {"header": header, "fields": found}
    at = data.draw(st.sampled_from([at for at in paths(whole) if len(at) > 1]))
    whole = put(whole, at, new)
    in_metadata = at[:2] == ("header", "__metadata__")
    text = json.dumps(whole["fields"])
    survives(kind, samples.closed(header, None if in_metadata else text, rest))


def mutated(draw, data):
    """Flip, cut, repeat or move a few bytes, or swap two digits of the header."""
    data = bytearray(data)
    for _ in range(draw.choice([1, 1, 1, 2, 5])):
        if not data:
            break
        before, header = len(data), 8 + int.from_bytes(data[:8], "little")
        at = draw.randrange(min(len(data), header if draw.random() < 0.7 else len(data)))
        to = min(len(data), at + draw.randrange(1, 20))
        way = draw.randrange(7)
        if way == 0:
            data[at] ^= 1 << draw.randrange(8)
        elif way == 1:
            data[at] = draw.randrange(256)
        elif way == 2:
            del data[at:to]
        elif way == 3:
            data[at:at] = data[at:to]
        elif way == 4:
            data[at:to] = draw.choice([b"-1", b"1e9", b"null", b"[]", b"{}", b'"', b"NaN", b"true"])
        elif way == 5:
            data[at] = ord(draw.choice('0123456789[]{},:"\\abAF '))
        else:
            del data[at:]
        if draw.random() < 0.7 and len(data) > 8:  # the header's length is told as it is now
            length = max(0, header - 8 + len(data) - before)
            data[:8] = min(length, 2**63).to_bytes(8, "little")
    return bytes(data)


@pytest.mark.parametrize("kind", KINDS)
def test_thousands_of_mutations_are_read_or_refused(kind):
    draw = random.Random(kind)
    refused = sum(survives(kind, mutated(draw, PACKETS[kind])) for _ in range(1500))
    assert refused > 700, "most do harm"


@pytest.mark.parametrize("kind", ["answer", "order", "profile"])
def test_every_beginning_of_a_packet_is_refused(kind):
    data = PACKETS[kind]
    assert all(survives(kind, data[:end]) for end in range(0, len(data), 7))
    assert survives(kind, data[:-1])


@st.composite
def tensors(draw, shape, dtypes=(torch.float32, torch.bfloat16, torch.float16, torch.float64)):
    """Draw a tensor of any bits."""
    dtype = draw(st.sampled_from(dtypes))
    count = shape[0] * shape[1] * dtype.itemsize
    raw = bytearray(draw(st.binary(min_size=count, max_size=count)))
    if not raw:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(raw, dtype=dtype).view(shape)


@st.composite
def deltas(draw):
    """Draw an update of one matrix of any kind, bits and layout, empty ones too."""
    m, n, r = (draw(st.integers(0, 4)) for _ in range(3))
    kind = draw(st.sampled_from(["dense", "factors", "sparse"]))
    if kind == "dense":
        matrix = draw(tensors((m, n)))
        return Dense(matrix.T if draw(st.booleans()) else matrix)
    if kind == "factors":
        b = draw(tensors((m, r)))
        return LowRank(b, draw(tensors((r, n), [b.dtype])))
    places = draw(st.lists(st.integers(0, m * n - 1), unique=True)) if m * n else []
    values = draw(tensors((len(places), 1))).view(-1)
    return Sparse(values, torch.tensor(places, dtype=torch.int64), (m, n))


NAMES = st.text(
    st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12
)  # also with | and quotes


@given(st.dictionaries(NAMES, deltas(), max_size=3), NAMES)
def test_any_adapter_comes_through_bit_by_bit(sites, client):
    adapter = Adapter(sites)
    came = read_evaluate_request(
        write_evaluate_request(EvaluateRequest((EvaluateQuery(adapter, (client,), "test"),)))
    )
    assert came.queries[0].adapter.hash() == adapter.hash()
    update = Update(client, 1, 0, samples.HASH, 3, adapter)
    data = write_train_result(update)
    came = read_train_result(data, SizeLimits(len(data), len(data), 9))
    assert came.adapter.hash() == adapter.hash()
    assert came.client == client


@given(st.dictionaries(NAMES, st.floats() | st.integers(-(2**63) + 1, 2**63 - 1), max_size=5))
def test_any_numbers_come_through(metrics):
    sent = samples.assignment()
    came = read_train_result(
        write_train_result(Failure("c", 1, 0, "x", metrics)), SizeLimits.of(sent)
    )
    assert repr(dict(came.metrics)) == repr(metrics)
