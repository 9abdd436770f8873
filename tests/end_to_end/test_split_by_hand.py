"""Split training written out by hand against itself, and the library's runs against it."""

import functools
import importlib.util
import math
import sys
from pathlib import Path

import pytest
import torch
from torch.func import functional_call
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import federations
from models import tiny_loaded
from polyrank.aggregation import rule
from polyrank.aggregation.client_factors import initial_rows
from polyrank.planning import CutPoint, Fleet, LoRAType, Scaling
from polyrank.run import RunSettings
from polyrank.seeds import derive
from polyrank.training import LocalTraining
from polyrank.training.batches import step_groups
from polyrank.training.split import SplitSettings

EXAMPLE = Path(__file__).parents[2] / "examples" / "hsplitlora_by_hand.py"


@pytest.fixture(scope="module")
def hand():
    spec = importlib.util.spec_from_file_location("hsplitlora_by_hand", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


# --- the example alone ---


def sums(hand, cuts, rounds=3, **options):
    """Return the merged sum per site after the last of the rounds."""
    *_, (merged, _) = hand.hsplitlora(*hand.problem(cuts), rounds, **options)
    return merged


def worst(one, other):
    assert one.keys() == other.keys()
    return max((one[site] - other[site]).abs().max().item() for site in one)


@pytest.mark.parametrize("cut", [(1,), (2,), (3,), (1, 2), (1, 3), (2, 3)])
@pytest.mark.parametrize("reinitialise", [True, False])
def test_split_clients_end_where_whole_ones_do_at_every_cut(hand, cut, reinitialise):
    whole = sums(hand, [()] * 5, reinitialise=reinitialise)
    split = sums(hand, [cut] * 5, reinitialise=reinitialise)
    assert min(matrix.norm() for matrix in whole.values()) > 0.05, "it must have learned something"
    assert worst(whole, split) < 1e-12  # float64; only norms are summed in another order


def test_mixed_cuts_end_where_whole_clients_do(hand):
    assert worst(sums(hand, [()] * 5), sums(hand, hand.MIXED)) < 1e-12


def test_whole_clients_by_hand_are_plain_torch(hand):
    network, clients = hand.problem([()] * 5)
    client = clients[3]
    starts = random_factors(network, client)
    (trained,) = hand.train(
        network, [network.base], [starts], [client], t=0, shared=False, clip=0.3, weight_decay=0.01
    )
    leaves = {s: [f.clone().requires_grad_() for f in pair] for s, pair in starts.items()}
    flat = [f for pair in leaves.values() for f in pair]
    optimizer = torch.optim.AdamW(flat, lr=0.02, weight_decay=0.01)
    norms = []
    for step in client.batches(0):
        x, y = (torch.cat(parts) for parts in zip(*step, strict=True))
        weights = {
            s: network.base[s] + client.alpha / client.ranks[s] * b @ a
            for s, (b, a) in leaves.items()
        }
        logits = network.forward(weights, x, 0, network.blocks)
        torch.nn.functional.cross_entropy(logits, y).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(flat, 0.3).item())
        optimizer.step()
        optimizer.zero_grad()
    assert min(norms) > 0.3, "the clip must act"
    for site, pair in leaves.items():
        for expected, got in zip(pair, trained[site], strict=True):
            assert (expected - got).abs().max() < 1e-12


def random_factors(network, client, seed=0):
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64) / 3

    return {
        s: (normal(w.shape[0], client.ranks[s]), normal(client.ranks[s], w.shape[1]))
        for s, w in network.base.items()
    }


def test_the_merged_sum_is_the_dense_sum_of_all_updates(hand):
    network, clients = hand.problem(hand.MIXED)
    weights = [client.examples / sum(c.examples for c in clients) for client in clients]
    total = {site: torch.zeros_like(w) for site, w in network.base.items()}
    for t, (merged, _) in enumerate(hand.hsplitlora(network, clients, 3)):
        starts = [
            {s: hand.fresh_start(c, w.shape, s, hand.fresh_rows, t) for s, w in total.items()}
            for c in clients
        ]
        frozen = [{s: w + total[s] for s, w in network.base.items()}] * len(clients)
        trained = hand.train(network, frozen, starts, clients, t, shared=False)
        for w, client, pairs in zip(weights, clients, trained, strict=True):
            for site, (b, a) in pairs.items():
                total[site] = total[site] + w * (client.alpha / client.ranks[site]) * (b @ a)
        assert worst(total, merged) < 1e-12


def test_keeping_the_adapters_starts_each_round_at_the_sum_and_ends_elsewhere(hand, monkeypatch):
    network, clients = hand.problem(hand.MIXED)
    weights = [client.examples / sum(c.examples for c in clients) for client in clients]
    met, ends, train = [], [], hand.train

    def noting(network, frozen, starts, clients, *rest, **more):
        begun = [
            {s: f[s] + client.product(s, *start[s]) for s in f}
            for f, start, client in zip(frozen, starts, clients, strict=True)
        ]  # what each client computes with before its first step
        trained = train(network, frozen, starts, clients, *rest, **more)
        met.append(begun)
        ends.append(trained)
        return trained

    monkeypatch.setattr(hand, "train", noting)
    found = [merged for merged, _ in hand.hsplitlora(network, clients, 3, reinitialise=False)]
    for before, begun in zip(found, met[1:], strict=False):
        for client in begun:
            assert worst({s: network.base[s] + before[s] for s in before}, client) < 1e-12
    for merged, trained in zip(found, ends, strict=True):  # all take part: increments telescope
        products = {
            s: sum(
                w * client.product(s, *pairs[s])
                for w, client, pairs in zip(weights, clients, trained, strict=True)
            )
            for s in merged
        }
        assert worst(merged, products) < 1e-12
    anew = sums(hand, hand.MIXED)
    assert worst(anew, found[-1]) > 0.01


@pytest.mark.parametrize("cuts", [[(2,)] * 5, [(2,), (1,), (3,), (1, 3), (2,)]])
def test_a_shared_server_part_descends_the_union_batch_and_client_parts_their_own(hand, cuts):
    network, clients = hand.problem(cuts, ranks=(2,) * 5)
    for client in clients:
        client.alpha = 4.0  # one adapter has one scale
    common = random_factors(network, clients[0])
    own = [random_factors(network, client, seed=1 + i) for i, client in enumerate(clients)]
    common, *own = (
        {s: [f.requires_grad_() for f in pair] for s, pair in factors.items()}
        for factors in (common, *own)
    )
    used = []
    for client, factors in zip(clients, own, strict=True):
        there = {s for s in factors if hand.at_server(network, client, s)}
        used.append({s: common[s] if s in there else factors[s] for s in factors})
    steps = [client.batches(0)[0] for client in clients]
    union = sum(hand.count(step) for step in steps)

    def summed(client, factors, step):
        weights = {s: network.base[s] + client.product(s, *factors[s]) for s in factors}
        x, y = (torch.cat(parts) for parts in zip(*step, strict=True))
        return hand.summed_loss(network.forward(weights, x, 0, network.blocks), y)

    losses = [summed(*parts) for parts in zip(clients, used, steps, strict=True)]
    leaves = [f for pair in common.values() for f in pair]
    expected = torch.autograd.grad(
        sum(losses) / union, leaves, retain_graph=True, allow_unused=True
    )
    heads = []
    for factors, step, loss in zip(used, steps, losses, strict=True):
        mine = [f for s in factors if factors[s] is not common[s] for f in factors[s]]
        mean = loss / hand.count(step)
        heads.append((mine, torch.autograd.grad(mean, mine, retain_graph=True)))
    for client, factors, step in zip(clients, used, steps, strict=True):
        share = hand.count(step) / union
        hand.accumulate(network, network.base, factors, client, step, share)
    assert any(gradient is not None for gradient in expected)
    for leaf, gradient in zip(leaves, expected, strict=True):
        assert (leaf.grad is None) == (gradient is None)
        if gradient is not None:
            assert (leaf.grad - gradient).abs().max() < 1e-12
    for mine, gradients in heads:
        for leaf, gradient in zip(mine, gradients, strict=True):
            assert (leaf.grad - gradient).abs().max() < 1e-12


# --- the library against the example ---

ROUNDS = 3
SEED = 5
ALPHA = 4.0
SITES = ("q_proj", "v_proj", "o_proj", "down_proj")
TYPES = {
    "one": LoRAType("one", {"all": 1}),
    "two": LoRAType("two", {"attention": 2, "feed-forward": 3}),
    "bent": LoRAType("bent", {"all": 4}),
    "whole": LoRAType("whole", {"attention": 3, "feed-forward": 5}),
}
EQUAL = {name: LoRAType(name, {"all": 2}) for name in TYPES}
CUTS = {"one": CutPoint(1), "two": CutPoint(2), "bent": CutPoint(1, 3)}
LOCAL = LocalTraining(
    lr=0.02, batch=2, accumulation=2, epochs=1, clip=0.3, weight_decay=0.01, dropout=0.0
)


class Llama:
    """A random Llama as the example wants it: blocks run by hand, weights from outside."""

    def __init__(self, model):
        self._module = model.module
        self.blocks = model.spec.blocks
        self.sites = {site: int(site.split(".")[2]) for site in model.spec.shapes}
        self.base = {s: model.module.get_submodule(s).weight.detach().clone() for s in self.sites}

    def forward(self, weights, x, first, last):
        inner = self._module.model
        h = inner.embed_tokens(x) if first == 0 else x
        length = h.shape[1]
        places = torch.arange(length)[None]
        rotary = inner.rotary_emb(h, places)
        mask = torch.full((length, length), -math.inf, dtype=h.dtype).triu(1)[None, None]
        for i in range(first, last):
            prefix = f"model.layers.{i}."
            own = {
                f"{site.removeprefix(prefix)}.weight": w
                for site, w in weights.items()
                if site.startswith(prefix)
            }
            given = {
                "attention_mask": mask,
                "position_ids": places,
                "position_embeddings": rotary,
            }
            out = functional_call(inner.layers[i], own, (h,), given)
            h = out[0] if isinstance(out, tuple) else out
        return self._module.lm_head(inner.norm(h)) if last == self.blocks else h


def micro_batch(rows):
    """Return token ids and the tokens to predict, N×T, padded on the right."""
    length = max(len(row.input_ids) for row in rows)
    x = torch.zeros(len(rows), length, dtype=torch.long)
    y = torch.full_like(x, -100)
    for i, row in enumerate(rows):
        ids = torch.tensor(row.input_ids)
        x[i, : len(ids)] = ids
        y[i, row.loss_from - 1 : len(ids) - 1] = ids[row.loss_from :]
    return x, y


def model():
    """Return a random Llama of four blocks that computes in float64 throughout.

    Its own norms round to float32. Two ways to scale one gradient then differ by 1e-7, which would
    hide what the comparison is about.
    """
    loaded = tiny_loaded("llama", dtype=torch.float64, num_hidden_layers=4, sites=SITES)
    for norm in loaded.module.modules():
        if isinstance(norm, LlamaRMSNorm):
            norm.forward = functools.partial(
                rms_norm, tuple(norm.weight.shape), weight=norm.weight, eps=norm.variance_epsilon
            )
    return loaded


def rms_norm(shape, x, weight, eps):
    return torch.nn.functional.rms_norm(x, shape, weight, eps)


def library(name, types, cuts, adapters="own", cohort=2):
    """Return the merged sum per site after each round, and the federation."""
    data = federations.clients(seen=6, examples=6)
    kinds = [*types]
    assigned = {f"c{i}": kinds[i % len(kinds)] for i in range(6)}
    parts = federations.opened(
        model=model(),
        data=data,
        rule=rule(name),
        local=LOCAL,
        fleet=Fleet.table(assigned, types=types, cuts=cuts),
        settings=RunSettings(
            seed=SEED,
            scaling=Scaling("fixed", ALPHA),
            evaluation=federations.QUIET,
            cohort=cohort,
            split=SplitSettings(wire="float64", adapters=adapters),
        ),
    )
    with parts:
        found = []
        for _ in parts.rounds(ROUNDS):
            found.append({s: d.dense() for s, d in parts.adapter.factors.items()})
    return found, parts


def clients_by_hand(hand, parts, cuts):
    """Return the example's clients with the examples, ranks and cuts of a federation's."""
    made = []
    for client in sorted(parts.ranks):
        rows = parts.work[client].rows["train"]

        def batches(t, client=client, rows=rows):
            seed = derive(SEED, t + 1, 0, client, "train")
            return [
                [micro_batch([rows[i] for i in micro]) for micro in step]
                for step in step_groups(len(rows), LOCAL, seed)
            ]

        split = cuts.get(parts.fleet.assigned[client])
        bounds = () if split is None else (split.lower, split.upper)
        cut = tuple(b for b in bounds if b is not None)
        made.append(hand.Client(parts.ranks[client], ALPHA, cut, len(rows), batches))
    return made


def by_hand(hand, parts, cuts, **options):
    """Yield the merged sum per site after each round."""

    def fresh(site, rank, n, t):
        rows = initial_rows(n, rank, seed=derive(SEED, t + 1, "deal"), site=site)
        return rows.float().double() if t == 0 else rows  # the state is float32 until a merge

    clients = clients_by_hand(hand, parts, cuts)
    training = {"lr": LOCAL.lr, "clip": LOCAL.clip, "weight_decay": LOCAL.weight_decay}
    found = hand.hsplitlora(Llama(parts.model), clients, ROUNDS, fresh=fresh, **training, **options)
    return [merged for merged, _ in found]


def test_the_llama_by_hand_is_the_model():
    loaded = model()
    network = Llama(loaded)
    ids = torch.randint(4, 97, (3, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = loaded.module(input_ids=ids).logits
        hidden = network.forward(network.base, ids, 0, 2)
        got = network.forward(network.base, hidden, 2, network.blocks)
    assert (expected - got).abs().max() < 1e-10
    changed = {s: w + 0.1 for s, w in network.base.items()}
    with torch.no_grad():
        other = network.forward(changed, ids, 0, network.blocks)
    assert (expected - other).abs().max() > 1e-3, "the weights must come from outside"


@pytest.mark.parametrize("cuts", [{}, CUTS, dict.fromkeys(TYPES, CutPoint(2))])
@pytest.mark.parametrize("name", ["flora", "flora:keep"])
def test_a_federation_of_split_clients_equals_hsplitlora_by_hand(hand, name, cuts):
    ours, parts = library(name, TYPES, cuts)
    assert len({tuple(sorted(ranks.items())) for ranks in parts.ranks.values()}) == 4
    expected = by_hand(hand, parts, cuts, reinitialise=name == "flora")
    agree(ours, expected)


def test_a_federation_with_one_server_part_for_all_equals_splitlora_by_hand(hand):
    cuts = dict.fromkeys(EQUAL, CutPoint(2))
    ours, parts = library("flora", EQUAL, cuts, adapters="shared")
    agree(ours, by_hand(hand, parts, cuts, shared=True))


def test_a_shared_server_part_with_mixed_cuts_equals_the_one_by_hand(hand):
    ours, parts = library("flora", EQUAL, CUTS, adapters="shared")
    agree(ours, by_hand(hand, parts, CUTS, shared=True))


def agree(ours, expected):
    assert len(ours) == len(expected) == ROUNDS
    for number, (got, sums) in enumerate(zip(ours, expected, strict=True), 1):
        assert min(matrix.norm() for matrix in sums.values()) > 0.01, "it must have learned"
        difference = worst(got, sums)
        assert difference < 1e-10, (number, difference)  # float64, sums in another order
