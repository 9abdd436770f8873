"""The approximate path: its promise on every kind of spectrum, its fallback, its memory."""

import math
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from polyrank.algebra import LowRank, factorise
from polyrank.algebra.factorisations import factor_randomised
from polyrank.algebra.factorisations.randomised import MOST_EXCESS

RANK = 40


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def orthonormal(rows: int, columns: int, seed: int) -> torch.Tensor:
    return torch.linalg.qr(normal(rows, columns, seed=seed)).Q


def levels(*steps: tuple[float, int]):
    """Return a spectrum of plateaus: (height, how many), the last one up to the end."""

    def s(size: int) -> torch.Tensor:
        flat = torch.cat([torch.full((many,), height) for height, many in steps[:-1]])
        return torch.nn.functional.pad(flat, (0, size - len(flat)), value=steps[-1][0])

    return s


def index(size: int) -> torch.Tensor:
    return torch.arange(1, size + 1).float()


SPECTRA = {
    "equal": lambda size: torch.ones(size),
    "linear": lambda size: torch.linspace(1, 0.9, size),
    "linear to zero": lambda size: torch.linspace(1, 0, size),
    "1/√j": lambda size: index(size).rsqrt(),
    "1/j": lambda size: 1 / index(size),
    "exponential": lambda size: torch.exp(-index(size) / RANK),
    "slow exponential": lambda size: torch.exp(-index(size) / (3 * RANK)),
    "less than rank": lambda size: (index(size) <= RANK // 2).float(),
    "a gap at rank": levels((1.0, RANK), (0.1, 0)),
    "a gap before rank": levels((1.0, RANK // 3), (0.1, 0)),
    "a gap behind rank": levels((1.0, 2 * RANK), (0.1, 0)),
    "two plateaus": levels((1.0, RANK), (0.95, RANK), (0.7, 0)),
    "two plateaus and a gap": levels((1.0, RANK), (0.95, RANK), (0.3, 0)),
    "two plateaus and a slope": lambda size: torch.cat(
        [levels((1.0, RANK), (0.97, 0))(2 * RANK), torch.linspace(0.95, 0.1, size - 2 * RANK)]
    ),
    "a few that stand out": levels((3.0, RANK // 8), (0.95, RANK), (0.3, 0)),
}
SHAPES = [(400, 380), (380, 460)]


def planted(spectrum: str, shape: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return D in float32 and all of its right singular vectors, by falling σ."""
    (m, n), size = shape, min(shape)
    u, v = orthonormal(m, size, seed=1), orthonormal(n, size, seed=2)
    return (u * SPECTRA[spectrum](size)) @ v.T, v


def starts(v: torch.Tensor) -> dict[str, torch.Tensor | None]:
    n = v.shape[0]
    tilted = torch.linalg.qr(v[:, :RANK] + 0.2 * normal(n, RANK, seed=5) / math.sqrt(n)).Q
    return {
        "cold": None,
        "exact": v[:, :RANK],
        "tilted": tilted,
        "useless": orthonormal(n, RANK, seed=6),
        "the smallest": v[:, -RANK:],
        "the next": v[:, RANK : 2 * RANK],  # an invariant subspace, and the wrong one
        "too few": v[:, : RANK // 4],
    }


def excess(d: torch.Tensor, found) -> float:
    """(‖D − X‖ − the smallest possible) / ‖D‖ in float64."""
    d = d.double()
    optimum = float(torch.linalg.svdvals(d)[RANK:].square().sum().sqrt())
    return (float((d - found.lowrank().dense().double()).norm()) - optimum) / float(d.norm())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_the_excess_stays_within_the_promise_from_every_start(spectrum, shape):
    d, v = planted(spectrum, shape)
    for name, warm in starts(v).items():
        found = factor_randomised(d, RANK, warm=warm, seed=3)
        assert excess(d, found) <= MOST_EXCESS, name
        assert found.rank <= RANK
        assert found.shape == shape


def clients(kind: str, m: int = 400, n: int = 380) -> list[LowRank]:
    """Twenty-four clients whose stack is wider than the matrix."""
    common = LowRank(
        orthonormal(m, RANK, seed=7) * index(RANK).rsqrt(), orthonormal(n, RANK, seed=8).T
    )
    terms = []
    for i, r in enumerate([8, 24, RANK] * 8):
        own = LowRank(normal(m, r, seed=100 + i) / 20, normal(r, n, seed=200 + i) / 20)
        near = common.prefix(r)
        if kind == "random":
            terms.append(own.scale(1 / 24))
            continue
        near = LowRank(near.b + 1e-3 * own.b, near.a + 1e-3 * own.a)
        terms.append(near.scale(1 / 24))
        if kind == "cancelling":
            terms.append(common.prefix(r).scale(-1 / 24))
    if kind == "cancelling":
        terms.append(common.scale(0.02))
    return terms


@pytest.mark.parametrize("kind", ["random", "collinear", "cancelling"])
def test_sums_of_clients_stay_within_the_promise(kind):
    terms = clients(kind)
    assert sum(term.rank for term in terms) > 380  # not thin
    d = sum(term.to(dtype=torch.float64).dense() for term in terms)
    good = torch.linalg.svd(d).Vh[:RANK].T.float()
    for warm in (None, good, orthonormal(380, RANK, seed=9)):
        found = factorise(iter(terms), RANK, method="randomised", warm=warm)
        assert excess(d, found) <= MOST_EXCESS


def test_what_decays_is_found_without_falling_back():
    for spectrum in ("1/√j", "1/j", "exponential", "a gap at rank", "less than rank"):
        d, v = planted(spectrum, (400, 380))
        for warm in (None, v[:, :RANK]):
            assert factor_randomised(d, RANK, warm=warm).method == "randomised"


def test_what_cannot_be_certified_goes_to_the_dense_path():
    d = normal(400, 380, seed=4)
    found = factor_randomised(d, 100)  # half of 380 columns are not enough for this
    assert found.method == "dense"
    assert abs(excess(d, factor_randomised(d, RANK))) <= MOST_EXCESS


def test_a_warm_start_of_the_right_subspace_needs_a_smaller_space_than_a_cold_one():
    d, v = planted("a gap at rank", (400, 380))
    products = {}
    for name, warm in (("cold", None), ("warm", v[:, :RANK])):
        with Live() as live:
            factor_randomised(d, RANK, warm=warm)
        products[name] = live.multiplied
    assert products["warm"] < 0.7 * products["cold"]


def test_the_seed_alone_decides_and_not_the_global_generator():
    d, _ = planted("1/√j", (400, 380))
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = factor_randomised(d, RANK, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(one.u, factor_randomised(d, RANK, seed=3).u)
    assert not torch.equal(one.u, factor_randomised(d, RANK, seed=4).u)


class Live(TorchDispatchMode):
    """Counts the bytes of all storages made inside that are still alive, and columns multiplied."""

    def __init__(self):
        super().__init__()
        self.now, self.most, self.multiplied, self.known = 0, 0, 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {self.key(x) for x in tree_leaves((args, kwargs)) if is_plain(x)}
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.mm.default:
            self.multiplied += args[0].shape[0] * args[0].shape[1] * args[1].shape[1]
        for x in tree_leaves(result):
            if is_plain(x) and self.key(x) not in given | self.known:
                self.enter(x.untyped_storage())
        return result

    @staticmethod
    def key(x):
        return x.untyped_storage()._cdata

    def enter(self, storage):
        key, size = storage._cdata, storage.nbytes()
        self.known.add(key)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self.leave, key, size)

    def leave(self, key, size):
        self.known.discard(key)
        self.now -= size


def is_plain(x) -> bool:
    return isinstance(x, torch.Tensor) and x.layout == torch.strided


def test_the_counter_of_live_bytes_sees_what_is_made_and_what_is_dropped():
    with Live() as live:
        x = torch.zeros(100)
        y = x + 1
        assert live.now == 800
        y = y[:10].mul_(2)  # a view of what is there
        assert live.now == 800
        del x
        y = None
        torch.ones(50)
    assert (live.now, live.most) == (0, 800)
    assert y is None


@pytest.mark.parametrize(("method", "most"), [("randomised", 3), ("auto", 9)])
@pytest.mark.parametrize("kind", ["random", "collinear"])
def test_at_most_three_dense_matrices_live_at_once_on_the_fast_path(method, most, kind):
    m, n, rank = 1100, 1000, 60
    one = 4 * m * n

    def terms():
        for i in range(60):
            b, a = normal(m, rank, seed=i) / 30, normal(rank, n, seed=i + 500) / 30
            if kind == "collinear":
                b, a = 1e-3 * b + normal(m, rank, seed=98), 1e-3 * a + normal(rank, n, seed=99)
            yield LowRank(b, a)

    with Live() as live:
        found = factorise(terms(), rank, method=method)
    assert found.method == {"randomised": "randomised", "auto": "dense"}[method]
    result = sum(x.nbytes for x in (found.u, found.s, found.v))
    assert live.most - result <= most * one


@pytest.mark.parametrize("method", ["auto", "dense", "randomised"])
def test_no_more_than_a_batch_of_terms_is_alive_once_the_stack_is_not_thin(method):
    alive = weakref.WeakSet()
    most = 0

    def terms():
        nonlocal most
        for i in range(100):
            term = LowRank(normal(200, 30, seed=i), normal(30, 180, seed=i))
            alive.add(term)
            if i >= 8:  # 240 columns: no stack of 180 rows is thin any more
                most = max(most, sum(one.rank for one in alive))
            yield term

    factorise(terms(), 5, method=method)
    assert 30 <= most <= 256 + 30
