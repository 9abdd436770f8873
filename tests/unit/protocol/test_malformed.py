"""Malformed packets are refused, with the place of the first mistake."""

import functools

import pytest
import torch

import packet_samples as samples
from polyrank.errors import PacketError
from polyrank.planning import CutPoint
from polyrank.protocol.client_info import read_node_info, write_node_info
from polyrank.protocol.evaluate import (
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
ANSWER = write_train_result(samples.update_to(SENT))
LEAN = write_train_result(samples.update_to(SENT), SENT)
FAILURE = write_train_result(Failure("c0", 3, 1, "why"))
TRAIN = write_train_request(samples.train_request())
SPLIT_TRAIN = write_train_request(samples.train_request(CutPoint(1, 3)))
NODE = write_node_info(samples.node_info())
EVALUATE = write_evaluate_request(samples.evaluate_request())
METRICS = write_client_metrics(samples.client_metrics())

READERS = {
    "answer": lambda data: read_train_result(data, SizeLimits.of(SENT)),
    "lean": lambda data: read_train_result(data, SizeLimits.of(SENT), SENT),
    "order": read_train_request,
    "profile": read_node_info,
    "exam": read_evaluate_request,
    "marks": lambda data: read_client_metrics(data, samples.evaluate_request()),
}

HUGE = "9" * 5000
DEEP = "[" * 100_000


def fields(**changes):
    """Change some fields of the packet."""
    return functools.partial(samples.with_fields, change=lambda found: found.update(changes))


def inside(change):
    """Change the fields in place."""
    return functools.partial(samples.with_fields, change=lambda found: [change(found), None][1])


def without(name):
    """Leave a field out."""
    return functools.partial(samples.with_fields, change=lambda found: found.__delitem__(name))


def header(change):
    """Change the header in place."""
    return functools.partial(samples.with_header, change=change)


def about(**changes):
    """Change some of the header's metadata."""
    return header(lambda found: found["__metadata__"].update(changes))


def raw(find, put):
    """Replace bytes of the header, and say its new length."""

    def change(data):
        length = int.from_bytes(data[:8], "little")
        text = data[8 : 8 + length]
        assert find in text
        text = text.replace(find, put, 1)
        return len(text).to_bytes(8, "little") + text + data[8 + length :]

    return change


def tensor(name, **changes):
    """Change what the header says of a tensor."""
    return header(lambda found: found[name].update(changes))


def renamed(old, new):
    """Give a tensor another name."""
    return header(lambda found: found.__setitem__(new, found.pop(old)))


def stored(name, value):
    """Write other numbers in the place of a tensor."""

    def change(data):
        head, _, rest = samples.opened(data)
        begin, end = head[name]["data_offsets"]
        assert end - begin == len(value)
        return samples.closed(head, None, rest[:begin] + value + rest[end:])

    return change


def ints(*numbers, dtype=torch.int32):
    return torch.tensor(numbers, dtype=dtype).numpy().tobytes()


def gap(data):
    """Leave four bytes that belong to no tensor before the last one."""
    head, _, rest = samples.opened(data)
    last = max((h for h in head if h != "__metadata__"), key=lambda h: head[h]["data_offsets"])
    begin, end = head[last]["data_offsets"]
    head[last]["data_offsets"] = [begin + 4, end + 4]
    return samples.closed(head, None, rest[:begin] + bytes(4) + rest[begin:])


def length(number):
    return lambda data: number.to_bytes(8, "little") + data[8:]


CASES = [
    # the block of bytes
    ("answer", ANSWER, lambda _: b"", "train result packet, length: expected 8 to"),
    ("answer", ANSWER, lambda d: d[:7], "train result packet, length"),
    ("answer", ANSWER, lambda d: d + bytes(10**6), "train result packet, length: expected 8 to"),
    (
        "answer",
        ANSWER,
        lambda d: d + b"\0",
        "train result packet, tensors: expected .* bytes in all",
    ),
    ("answer", ANSWER, lambda d: d[:-1], "data_offsets: expected a whole number of 0 to"),
    ("answer", ANSWER, gap, "train result packet, tensors: expected one that begins at byte"),
    ("answer", ANSWER, lambda _: "text", "train result packet: expected bytes; str came"),
    ("answer", ANSWER, length(2**63), "length of the header: expected at most"),
    ("profile", NODE, length(2**22 + 1), "length of the header: expected at most"),
    ("answer", ANSWER, length(0), "train result packet, header: expected JSON"),
    ("answer", ANSWER, length(3), "train result packet, header: expected JSON"),
    # the header
    ("answer", ANSWER, raw(b"{", b"["), "header: expected JSON"),
    ("answer", ANSWER, raw(b'"polyrank"', b'"\xff\xff"'), "header: expected UTF-8"),
    ("answer", ANSWER, lambda _: b"\2" + bytes(7) + b"[]", "header: expected a table"),
    ("answer", ANSWER, lambda _: b"\2" + bytes(7) + b"{}", "metadata: expected a table; None"),
    ("answer", ANSWER, raw(b'"dtype":"F32"', b'"dtype":NaN'), "header: expected JSON, which has"),
    ("answer", ANSWER, raw(b'"schema":"1"', b'"schema":"1","schema":"1"'), "each key once"),
    ("answer", ANSWER, raw(b'"schema":"1"', b'"schema":' + HUGE.encode()), "one of 5000 digits"),
    ("answer", ANSWER, raw(b'"schema":"1"', b'"schema":' + DEEP.encode()), "header: expected JSON"),
    ("answer", ANSWER, about(schema="2"), "metadata, schema: expected 1, .*'2' of polyrank"),
    ("answer", ANSWER, about(schema=1), "metadata, schema: expected a text"),
    ("answer", ANSWER, about(polyrank="v" * 100), "metadata, polyrank: expected a text of 1 to 64"),
    ("answer", TRAIN, lambda d: d, "metadata, packet: expected one of answer; 'order' came"),
    ("answer", ANSWER, about(more="x"), "metadata: expected no other field"),
    ("answer", ANSWER, about(fields="{"), "metadata, fields: expected JSON"),
    ("answer", ANSWER, about(fields="[1]"), "train result packet: expected a table"),
    ("answer", ANSWER, about(fields=DEEP), "metadata, fields: expected JSON"),
    ("answer", ANSWER, about(fields={}), "metadata, fields: expected a text"),
    # tensors
    ("answer", ANSWER, tensor("trained|block.1.k|matrix", dtype="F8"), "dtype: expected one of"),
    ("answer", ANSWER, tensor("trained|block.1.k|matrix", dtype=[]), "dtype: expected one of"),
    ("answer", ANSWER, tensor("trained|block.1.k|matrix", shape=[3, 3]), "36 bytes, by its shape"),
    ("answer", ANSWER, tensor("trained|block.1.k|matrix", shape=[1, 2, 3]), "at most 2 axes"),
    ("answer", ANSWER, tensor("trained|block.1.k|matrix", shape=[-2, -3]), "shape: expected a w"),
    ("answer", ANSWER, tensor("trained|block.1.k|matrix", shape=[2.0, 3]), "shape: expected a w"),
    ("answer", ANSWER, tensor("trained|block.1.k|matrix", shape=[True, 6]), "shape: expected a w"),
    ("answer", ANSWER, tensor("trained|block.1.k|matrix", shape=[2**62, 4]), "shape: expected a w"),
    ("answer", ANSWER, tensor("trained|block.1.k|matrix", shape=6), "shape: expected a list"),
    ("answer", ANSWER, tensor("trained|block.1.k|matrix", shape=[6]), "a shape of any×any; 6 came"),
    ("answer", ANSWER, tensor("trained|block.1.k|matrix", data_offsets=[0]), "a beginning and an"),
    ("answer", ANSWER, tensor("trained|block.1.k|matrix", data_offsets=[0, 2**60]), "data_offsets"),
    ("answer", ANSWER, tensor("trained|block.1.k|matrix", data_offsets=[48, 0]), "expected 24 by"),
    (
        "answer",
        ANSWER,
        tensor("trained|block.1.k|matrix", data_offsets=[8, 32]),
        "tensors: expected one that begins at byte ",
    ),
    ("answer", ANSWER, tensor("trained|block.1.k|matrix", more=1), "expected no other field"),
    (
        "answer",
        ANSWER,
        header(lambda h: h.update({"trained|block.1.k|matrix": 3})),
        "matrix': expected a table",
    ),
    (
        "answer",
        ANSWER,
        header(lambda h: h.update({f"x{i}": h["trained|block.0.v|b"] for i in range(20)})),
        "train result packet, tensors: expected at most 10; 30 came",
    ),
    (
        "answer",
        ANSWER,
        renamed("trained|block.1.k|matrix", "alien|block.1.k|matrix"),
        r"train result packet, tensors: expected no other; \['alien",
    ),
    (
        "answer",
        ANSWER,
        renamed("trained|block.1.k|matrix", "trained|block.1.k|pickle"),
        r"trained\|block.1.k': expected factors b and a.*\['pickle'\]",
    ),
    (
        "answer",
        ANSWER,
        renamed("trained|block.1.k|matrix", "\udcff"),
        "tensor '.*': expected text that UTF-8",
    ),
    (
        "answer",
        ANSWER,
        renamed("trained|block.1.k|matrix", "s" * 2000),
        "expected a text of 1 to 1024 bytes; 2000 bytes came",
    ),
    (
        "answer",
        ANSWER,
        tensor("trained|block.0.q|a", shape=[1, 10]),
        r"tensor 'trained\|block.0.q\|a': expected a shape of 2×any; 1×10",
    ),
    (
        "answer",
        ANSWER,
        tensor("trained|block.0.q|a", dtype="I32"),
        "expected one of .'F32'.; I32 came",
    ),
    (
        "answer",
        ANSWER,
        tensor("trained|block.1.k|matrix", dtype="I64", shape=[1, 3]),
        "matrix': expected one of .*; I64 came",
    ),
    (
        "answer",
        ANSWER,
        stored("trained|block.1.q|positions", ints(1, 30, 2)),
        "positions of 0 to 29; 1 to 30 came",
    ),
    (
        "answer",
        ANSWER,
        stored("trained|block.1.q|positions", ints(-1, 3, 2)),
        "positions of 0 to 29; -1 to 3 came",
    ),
    (
        "answer",
        ANSWER,
        stored("trained|block.1.q|positions", ints(3, 2, 3)),
        "each position once",
    ),
    (
        "answer",
        ANSWER,
        stored("trained|block.1.q|shape", ints(-6, 5, dtype=torch.int64)),
        "a shape of two numbers below 2147483648; -6×5 came",
    ),
    # answers to an assignment
    ("lean", ANSWER, lambda d: d, r"expected no other; .*block.1.q\|positions"),
    (
        "lean",
        LEAN,
        tensor("trained|block.0.q|b", shape=[4, 3]),
        "expected a shape of 6×2; 4×3 came",
    ),
    (
        "lean",
        LEAN,
        renamed("trained|block.0.q|b", "trained|block.9.q|b"),
        r"tensor 'trained\|block.0.q\|b': expected a tensor; none came",
    ),
    ("lean", LEAN, fields(examples=True), "train result packet, examples: expected a whole number"),
    ("lean", LEAN, fields(examples=-1), "train result packet, examples: expected a whole number"),
    (
        "lean",
        LEAN,
        fields(examples=10**19),
        "train result packet, examples: expected a whole number",
    ),
    ("lean", LEAN, fields(round=1.0), "train result packet, round: expected a whole number"),
    ("lean", LEAN, fields(attempt=None), "train result packet, attempt: expected a whole number"),
    ("lean", LEAN, fields(client=""), "train result packet, client: expected a text of 1 to 1024"),
    ("lean", LEAN, fields(client="c" * 10**5), "train result packet, client: .*100000 bytes came"),
    (
        "lean",
        LEAN,
        fields(client="\ud800"),
        "train result packet, client: expected text that UTF-8",
    ),
    ("lean", LEAN, fields(client=7), "train result packet, client: expected a text; 7 came"),
    (
        "lean",
        LEAN,
        fields(assignment="0" * 63),
        "train result packet, assignment: expected a SHA-256",
    ),
    (
        "lean",
        LEAN,
        fields(assignment="G" * 64),
        "train result packet, assignment: expected a SHA-256",
    ),
    ("lean", LEAN, fields(metrics=[]), "train result packet, metrics: expected a table"),
    ("lean", LEAN, fields(metrics={"loss": True}), "metrics, 'loss': expected a number; True"),
    ("lean", LEAN, fields(metrics={"loss": "1.0"}), "metrics, 'loss': expected a number; '1.0'"),
    ("lean", LEAN, fields(metrics={"loss": 10**19}), "metrics, 'loss': expected a whole number"),
    ("lean", LEAN, fields(metrics={"loss": float("nan")}), "fields: expected JSON.*NaN came"),
    ("lean", LEAN, fields(metrics={"loss": float("inf")}), "fields: expected JSON.*Infinity came"),
    (
        "lean",
        LEAN,
        about(fields='{"metrics":{"x":1e999}}'),
        "train result packet, client: .*none came",
    ),
    ("lean", LEAN, fields(metrics={"m" * 2000: 1}), "metrics, a name: expected a text of 1 to"),
    ("lean", LEAN, fields(importance={"s": None}), "importance, 's': expected a number; None"),
    ("lean", LEAN, fields(reason="no", kind="failed"), "train result packet: expected no other"),
    (
        "lean",
        LEAN,
        fields(more=1),
        r"train result packet: expected no other field; \['more'\] came",
    ),
    ("lean", LEAN, without("examples"), "train result packet, examples: expected a value; none"),
    ("lean", FAILURE, fields(reason=3), "train result packet, reason: expected a text"),
    ("lean", FAILURE, fields(reason="r" * 5000), "train result packet, reason: .*5000 bytes came"),
    (
        "lean",
        FAILURE,
        fields(kind="lost"),
        "train result packet, kind: expected one of failed, late, re",
    ),
    ("lean", FAILURE, fields(kind=["failed"]), "train result packet, kind: expected one of failed"),
    ("lean", FAILURE, fields(reason=None), "train result packet, assignment: expected a value"),
    # train requests
    ("order", TRAIN, fields(part=samples.HASH), "assignment: expected one with the hash 01234567"),
    ("order", TRAIN, fields(assignment=samples.HASH), "assignment: expected .*the whole model"),
    ("order", TRAIN, lambda d: d[:-1] + bytes([d[-1] ^ 1]), "expected one with the hash"),
    ("order", TRAIN, fields(scale=[1.0]), "train request packet, scale: expected 5 numbers"),
    ("order", TRAIN, fields(scale=[1, 1, 1, 1, 1]), "scale: expected a floating-point number; 1"),
    ("order", TRAIN, fields(scale="1.0"), "train request packet, scale: expected a list"),
    (
        "order",
        TRAIN,
        fields(train="a"),
        "train request packet, train: expected one of both, b; 'a' came",
    ),
    ("order", TRAIN, fields(negatives=[9]), "negatives: expected a whole number of 0 to 4; 9"),
    ("order", TRAIN, fields(negatives=[True]), "negatives: expected a whole number of 0 to 4; T"),
    ("order", TRAIN, fields(negatives=[0]), "negatives: expected sites with a low-rank start"),
    ("order", TRAIN, fields(negatives=[1, 1]), "negatives: expected sites with a low-rank start"),
    ("order", TRAIN, fields(negatives=[3]), "negatives: expected sites with a low-rank start"),
    ("order", TRAIN, fields(penalty={"strength": 1.0}), "penalty, keep: expected a value"),
    (
        "order",
        TRAIN,
        fields(penalty={"strength": 1, "keep": {}}),
        "penalty, strength: expected a f",
    ),
    (
        "order",
        TRAIN,
        fields(penalty={"strength": 0.5, "keep": {"x": 1}}),
        "penalty, keep, 'x': expected a site that starts",
    ),
    (
        "order",
        TRAIN,
        fields(penalty={"strength": 0.5, "keep": {"block.0.q": 3}}),
        "penalty, keep, 'block.0.q': expected a whole number of 0 to 2",
    ),
    ("order", TRAIN, fields(seed=2**64), "train request packet, seed: expected a whole number"),
    (
        "order",
        TRAIN,
        fields(metric="loss"),
        "train request packet, metric: expected one of channel, paper",
    ),
    ("order", TRAIN, fields(score_every=-1), "train request packet, score_every: expected a whole"),
    (
        "order",
        TRAIN,
        fields(seconds=-1.0),
        "train request packet, seconds: expected a finite number of 0",
    ),
    (
        "order",
        TRAIN,
        fields(seconds=1e12),
        "train request packet, seconds: expected a finite number of 0",
    ),
    ("order", TRAIN, fields(seconds="1"), "train request packet, seconds: expected a number"),
    (
        "order",
        SPLIT_TRAIN,
        fields(cut=[2]),
        "train request packet, cut: expected a lower and an upper",
    ),
    (
        "order",
        SPLIT_TRAIN,
        fields(cut=[0, 2]),
        "train request packet, cut: expected a whole number of 1",
    ),
    (
        "order",
        SPLIT_TRAIN,
        fields(cut=[2, 2]),
        "train request packet, cut: expected a whole number of 3",
    ),
    ("order", SPLIT_TRAIN, fields(cut=2), "train request packet, cut: expected a list"),
    (
        "order",
        TRAIN,
        renamed("start|block.1.k|matrix", "frozen|block.1.k|matrix"),
        "frozen at 'block.1.k': expected LowRank; Dense came",
    ),
    (
        "order",
        TRAIN,
        tensor("merged|block.0.q|matrix", shape=[5, 6]),
        r"merged at 'block.0.q': expected the start's shape \(6, 5\); \(5, 6\) came",
    ),
    # profiles
    ("profile", NODE, fields(hosted={}), "registration packet, hosted: expected a list"),
    ("profile", NODE, fields(hosted=[3]), "hosted, number 0: expected a table; 3 came"),
    ("profile", NODE, inside(lambda f: f["hosted"].append(f["hosted"][0])), "each client once"),
    (
        "profile",
        NODE,
        inside(lambda f: f["hosted"][1].update(seen=1)),
        "hosted, number 1, seen: expected true or false; 1 came",
    ),
    (
        "profile",
        NODE,
        inside(lambda f: f["hosted"][0]["counts"].update(train=[5, 40])),
        "counts, train: expected rows, tokens and targets; 2 numbers",
    ),
    (
        "profile",
        NODE,
        inside(lambda f: f["hosted"][0]["counts"].update(train=[5, 40, 41])),
        "counts, train: .*no more targets than tokens",
    ),
    (
        "profile",
        NODE,
        inside(lambda f: f["hosted"][0]["counts"].update(train=[0, 4, 1])),
        "counts, train: expected tokens where there are rows",
    ),
    (
        "profile",
        NODE,
        inside(lambda f: f["hosted"][0]["counts"].update(train=[2**31, 4, 1])),
        "counts, train: expected a whole number",
    ),
    (
        "profile",
        NODE,
        inside(lambda f: f["hosted"][0]["counts"].pop("test")),
        "counts, test: expected a value; none came",
    ),
    (
        "profile",
        NODE,
        inside(lambda f: f["hosted"][0]["counts"].update(texts=[1, 2, 1])),
        "number 0, counts: expected no other field; .'texts'. came",
    ),
    (
        "profile",
        NODE,
        inside(lambda f: f["hosted"][0].update(examples="secret")),
        "number 0: expected no other field",
    ),
    ("profile", NODE, inside(lambda f: f["device"].update(memory_bytes=0)), "memory_bytes: exp"),
    (
        "profile",
        NODE,
        inside(lambda f: f["device"].update(name="a\nb")),
        "device, name: .*printable",
    ),
    ("profile", NODE, fields(versions={"torch": "\x1b[2J"}), "versions, 'torch': .*printable"),
    (
        "profile",
        NODE,
        inside(lambda f: f["hosted"][0].update(client="\u202ea")),
        "client: .*printable",
    ),
    (
        "profile",
        NODE,
        inside(lambda f: f["hosted"][0].update(client=" ")),
        "client: .*printable",
    ),
    (
        "profile",
        NODE,
        inside(lambda f: f["hosted"][0].update(category="\r")),
        "category: .*printable",
    ),
    ("profile", NODE, inside(lambda f: f["device"].update(flops=-1)), "device: .*devices.board"),
    ("profile", NODE, inside(lambda f: f["device"].update(up=10**25)), "expected whole numbers"),
    (
        "profile",
        NODE,
        inside(lambda f: f["device"].update(name=[])),
        "device, name: expected a t",
    ),
    (
        "profile",
        NODE,
        inside(lambda f: f["device"].update(latency=None)),
        "device, latency: exp",
    ),
    (
        "profile",
        NODE,
        inside(lambda f: f["terms"].update(largest_rank=0)),
        "terms, largest_rank",
    ),
    ("profile", NODE, inside(lambda f: f["terms"].update(lowest_cut=True)), "terms, lowest_cut"),
    (
        "profile",
        NODE,
        inside(lambda f: f["terms"].update(labels_may_leave="yes")),
        "terms, labels_may_leave: expected true or false; 'yes' came",
    ),
    ("profile", NODE, inside(lambda f: f["terms"].update(smallest_count=-1)), "smallest_count"),
    ("profile", NODE, fields(versions={"torch": 2}), "versions, 'torch': expected a text"),
    ("profile", NODE, fields(versions={"torch": "2" * 99}), "versions, 'torch': .*99 bytes"),
    ("profile", NODE, fields(refusal="r" * 5000), "registration packet, refusal: expected a text"),
    (
        "profile",
        NODE,
        header(lambda h: h.update(t={"dtype": "F32", "shape": [0], "data_offsets": [0, 0]})),
        "registration packet, tensors: expected at most 0; 1 came",
    ),
    # exams
    (
        "exam",
        EVALUATE,
        fields(adapters=9),
        "evaluate request packet, adapters: expected a whole number of 0 to 4",
    ),
    (
        "exam",
        EVALUATE,
        fields(adapters=1),
        "questions, number 2, adapter: expected .* of 0 to 0; 1",
    ),
    (
        "exam",
        EVALUATE,
        fields(questions="all"),
        "evaluate request packet, questions: expected a list",
    ),
    (
        "exam",
        EVALUATE,
        inside(lambda f: f["questions"][0].update(part="all")),
        "number 0, part: expect",
    ),
    (
        "exam",
        EVALUATE,
        inside(lambda f: f["questions"][0].update(texts=0)),
        "number 0, texts: expected",
    ),
    (
        "exam",
        EVALUATE,
        inside(lambda f: f["questions"][0].update(clients="c")),
        "clients: expected a l",
    ),
    (
        "exam",
        EVALUATE,
        inside(lambda f: f["questions"][0].update(clients=["c", "c"])),
        "client once",
    ),
    (
        "exam",
        EVALUATE,
        inside(lambda f: f["questions"][0].update(clients=[1])),
        "clients: expected a t",
    ),
    (
        "exam",
        EVALUATE,
        inside(lambda f: f["questions"][0].update(prompt="x")),
        "expected no other field",
    ),
    (
        "exam",
        EVALUATE,
        renamed("adapter 0|block.1.k|matrix", "adapter 7|block.1.k|matrix"),
        r"evaluate request packet, tensors: expected no other; \['adapter 7\|block.1.k\|matrix'\]",
    ),
    # metrics
    ("marks", METRICS, inside(lambda f: f["questions"].pop()), "expected 4, as were asked; 3 came"),
    (
        "marks",
        METRICS,
        inside(lambda f: f["questions"][3]["clients"].update(c1=[1.0, None, None])),
        "number 3, clients, 'c1': expected a client that was asked",
    ),
    (
        "marks",
        METRICS,
        inside(lambda f: f["questions"][0]["clients"].update(c1=[1.0, None])),
        "number 0, clients, 'c1': expected 3 scores; 2 came",
    ),
    (
        "marks",
        METRICS,
        inside(lambda f: f["questions"][0]["clients"].update(c1=[1.0, 1.5, None])),
        "'c1', exact_match: expected a finite number of 0 to 1; 1.5 came",
    ),
    (
        "marks",
        METRICS,
        inside(lambda f: f["questions"][0]["clients"].update(c1=[False, 0, 0])),
        "'c1', loss: expected a number; False came",
    ),
    (
        "marks",
        METRICS,
        inside(lambda f: f["questions"][0]["clients"].update(c1="good")),
        "'c1': expected a list; 'good' came",
    ),
    ("marks", METRICS, inside(lambda f: f["questions"][0].update(no_room=-1)), "no_room: expected"),
]


@pytest.mark.parametrize(
    ("reader", "data", "spoil", "place"),
    CASES,
    ids=[f"{i}-{case[0]}-{case[3][:40]}" for i, case in enumerate(CASES)],
)
def test_it_is_refused_with_its_place(reader, data, spoil, place):
    with pytest.raises(PacketError, match=place) as refused:
        READERS[reader](spoil(data))
    assert len(str(refused.value)) < 1000


def test_the_packets_are_well_without_the_changes():
    whole = {"answer": [ANSWER], "lean": [LEAN, FAILURE], "order": [TRAIN, SPLIT_TRAIN]}
    whole |= {"profile": [NODE], "exam": [EVALUATE], "marks": [METRICS]}
    for reader, packets in whole.items():
        for data in packets:
            READERS[reader](data)
            READERS[reader](samples.with_fields(data, lambda _: None))


def test_a_header_is_not_parsed_before_its_length_is_bounded(monkeypatch):
    def parse(*_):
        raise AssertionError("it was parsed")

    monkeypatch.setattr("polyrank.protocol.json_fields.parse", parse)
    limits = SizeLimits.of(SENT)
    large = b"{" + b" " * limits.header
    with pytest.raises(PacketError, match="length of the header"):
        READERS["answer"](len(large).to_bytes(8, "little") + large)
    with pytest.raises(PacketError, match="train result packet, length"):
        READERS["answer"](bytes(limits.nbytes + 1))


def test_nothing_is_made_for_a_tensor_that_is_not_wanted(monkeypatch):
    """A refused shape allocates nothing, whatever it claims."""
    made = []
    real = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: made.append(a) or real(*a, **k))
    wide = tensor("trained|block.0.k|b", shape=[12, 1])(LEAN)
    with pytest.raises(PacketError, match="expected a shape of 6×2; 12×1"):
        READERS["lean"](wide)
    assert made == []


def test_a_machine_of_the_other_byte_order_is_told(monkeypatch):
    monkeypatch.setattr("sys.byteorder", "big")
    with pytest.raises(PacketError, match="little-endian"):
        READERS["profile"](NODE)
    with pytest.raises(PacketError, match="little-endian"):
        write_node_info(samples.node_info())
