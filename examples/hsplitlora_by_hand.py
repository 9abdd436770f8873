"""HSplitLoRA written out by hand: plain torch, float64, dense sums, nothing of polyrank.

A small network of four blocks is adapted by five clients of unequal rank, α, data and cut. A split
client runs its first blocks, the server those behind the cut and, in a U-shape, the client again
those behind a second cut. What passes a cut are numbers, forwards h and backwards ∂L/∂h, never a
graph. After each round the factors are concatenated into one exact sum, without noise.

    python examples/hsplitlora_by_hand.py

It is meant to be read from top to bottom, and it is the oracle that the library is tested against.
Lin et al., arXiv 2505.02795; the shared server side: SplitLoRA, arXiv 2407.00952. What is ours is
told in docs/explanation/methods.md.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch.nn.functional import cross_entropy

F64 = torch.float64
BLOCKS, WIDTH, WORDS = 4, 8, 20


@dataclass
class Client:
    """A client: rank per matrix, α (s = α/r), cuts (none: whole; one; two: U-shape), and its data.

    `batches(t)` gives the steps of round t, each a list of microbatches (x, y).
    """

    ranks: dict[str, int]
    alpha: float
    cuts: tuple[int, ...]
    examples: int
    batches: Callable[[int], list]

    def product(self, site, b, a):
        """Return s·B A."""
        return self.alpha / self.ranks[site] * b @ a


class Network:
    """Residual blocks of two matrices each, between a frozen embedding and a frozen output."""

    def __init__(self, seed=0):
        draw = torch.Generator().manual_seed(seed)

        def normal(m, n):
            return torch.randn(m, n, generator=draw, dtype=F64) / math.sqrt(n)

        self.blocks = BLOCKS
        self.sites = {f"{i}.{name}": i for i in range(BLOCKS) for name in ("up", "down")}
        self.base = {s: normal(WIDTH, 10) if "down" in s else normal(10, WIDTH) for s in self.sites}
        self.embedding, self.output = normal(WORDS, WIDTH) * 3, normal(WORDS, WIDTH) * 3

    def forward(self, weights, x, first, last):
        """Run blocks `first` … `last` − 1; x are words before block 0, and logits come out last."""
        h = self.embedding[x].mean(-2) if first == 0 else x
        for i in range(first, last):
            h = h + torch.tanh(h @ weights[f"{i}.up"].T) @ weights[f"{i}.down"].T
        return h @ self.output.T if last == self.blocks else h


def accumulate(network, frozen, factors, client, microbatches, share=1.0):
    """Add one step's gradient to B.grad and A.grad and return the loss, the mean over all targets.

    Each part has a graph of its own. `share` scales what the server descends, not what the client
    gets back: in a batch shared with others, the client's part of all targets.
    """
    targets, total = count(microbatches), 0.0
    for x, y in microbatches:
        graphs, sent = [], x
        for first, last in pairwise([0, *client.cuts, network.blocks]):  # client, server, client
            received = sent.detach().requires_grad_(first > 0)
            mine = [s for s, block in network.sites.items() if first <= block < last]
            weights = {s: frozen[s] + client.product(s, *factors[s]) for s in mine}
            sent = network.forward(weights, received, first, last)
            graphs.append((received, sent))
        loss = summed_loss(sent, y) / targets  # whoever runs the last part has the labels
        graphs[-1] = received, loss
        gradient = None
        for part, (received, result) in reversed([*enumerate(graphs)]):
            scale = share if part == 1 else 1.0
            (result * scale).backward(gradient)
            gradient = received.grad / scale if part else None  # goes back over the cut
        total += loss.item()
    return total


def summed_loss(logits, y):
    return cross_entropy(logits.flatten(0, -2), y.flatten(), ignore_index=-100, reduction="sum")


def count(microbatches):
    return sum(int((y >= 0).sum()) for _, y in microbatches)


def clip_and_step(sides, optimizers, clip):
    """Each side tells its squared norm; the factor on the gradients is common to all of them."""
    squared = sum(f.grad.square().sum() for side in sides for f in side if f.grad is not None)
    factor = min(1.0, clip / (math.sqrt(squared) + 1e-6))
    for side, optimizer in zip(sides, optimizers, strict=True):
        for f in side:
            f.grad = None if f.grad is None else f.grad * factor
        optimizer.step()
        optimizer.zero_grad()


def at_server(network, client, site):
    low, high = [*client.cuts, network.blocks, network.blocks][:2]
    return low <= network.sites[site] < high


def train(network, frozen, starts, clients, t, shared, lr=0.02, clip=0.3, weight_decay=0.01):
    """Train all clients for a round, step by step, and return their factors.

    Both sides of a client are clipped by one factor. If `shared`, the server has one adapter for
    all split clients, which descends the mean over all their targets, and each side clips itself.
    """
    common, factors, sides = {}, [], []
    for client, start in zip(clients, starts, strict=True):
        there = {site for site in start if at_server(network, client, site)}
        pairs = {site: [f.clone().requires_grad_() for f in start[site]] for site in start}
        if shared:
            pairs |= {site: common.setdefault(site, pairs[site]) for site in there}
        head = [f for site in pairs if site not in there for f in pairs[site]]
        tail = [f for site in pairs if site in there for f in pairs[site]]
        factors.append(pairs)
        sides.append([head, tail] if there and not shared else [head])
    sides.append([[f for pair in common.values() for f in pair]] if common else [])
    optimizers = [
        [torch.optim.AdamW(side, lr=lr, weight_decay=weight_decay) for side in group]
        for group in sides
    ]  # new ones every round
    steps = [client.batches(t) for client in clients]
    for k in range(max(map(len, steps))):
        active = [i for i, of_client in enumerate(steps) if k < len(of_client)]
        union = sum(count(steps[i][k]) for i in active if clients[i].cuts)
        for i in active:
            share = count(steps[i][k]) / union if shared and clients[i].cuts else 1.0
            accumulate(network, frozen[i], factors[i], clients[i], steps[i][k], share)
        for i in [*active, -1]:
            clip_and_step(sides[i], optimizers[i], clip)
    return [{s: (b.detach(), a.detach()) for s, (b, a) in pairs.items()} for pairs in factors]


def fresh_start(client, shape, site, fresh, t):
    """Return B = 0 and LoRA's initial A, whose first rows are the same for all clients."""
    m, n = shape
    return torch.zeros(m, client.ranks[site], dtype=F64), fresh(site, client.ranks[site], n, t)


def fresh_rows(site, rank, n, t):
    draw = torch.Generator().manual_seed(1000 * t + sum(map(ord, site)))
    return (torch.rand(rank, n, generator=draw, dtype=F64) * 2 - 1) / math.sqrt(n)


def concatenated(weighted):
    """Return [w_1 s_1 B_1 … w_N s_N B_N] [A_1; …; A_N], which is Σ w_i s_i B_i A_i exactly."""
    return torch.cat([b for b, _ in weighted], 1) @ torch.cat([a for _, a in weighted])


def hsplitlora(
    network, clients, rounds, reinitialise=True, shared=False, fresh=fresh_rows, **training
):
    """Yield (the merged sum per site, mean loss over all targets) after each round.

    The sum is kept apart from the base. With `reinitialise` every round starts from fresh factors.
    Without, a client goes on with its own; as their product is in the sum already, it is taken off
    what the client computes with, and off what it adds to the sum.
    """
    weights = [client.examples / sum(c.examples for c in clients) for client in clients]
    merged = {site: torch.zeros_like(w) for site, w in network.base.items()}
    kept = None
    for t in range(rounds):
        starts = kept or [
            {s: fresh_start(c, w.shape, s, fresh, t) for s, w in network.base.items()}
            for c in clients
        ]
        frozen = [
            {s: w + merged[s] - c.product(s, *start[s]) for s, w in network.base.items()}
            for c, start in zip(clients, starts, strict=True)
        ]
        trained = train(network, frozen, starts, clients, t, shared, **training)
        for s in merged:
            parts = []
            for w, c, before, after in zip(weights, clients, starts, trained, strict=True):
                scale = w * c.alpha / c.ranks[s]
                parts.append((scale * after[s][0], after[s][1]))
                if not reinitialise:
                    parts.append((-scale * before[s][0], before[s][1]))
            merged[s] = merged[s] + concatenated(parts)
        kept = None if reinitialise else trained
        yield dict(merged), evaluate(network, merged, clients)


def evaluate(network, merged, clients):
    """Return the mean loss of the network with the sum, over the clients' data of round 0."""
    weights = {site: w + merged[site] for site, w in network.base.items()}
    micro = [pair for client in clients for step in client.batches(0) for pair in step]
    losses = [summed_loss(network.forward(weights, x, 0, network.blocks), y) for x, y in micro]
    return float(sum(losses) / count(micro))


RANKS = (1, 2, 4, 3, 2)
MIXED = [(), (2,), (1,), (1, 3), ()]
RUNS = {  # name: cuts and ranks of the clients, options
    "whole": ([()] * 5, RANKS, {}),
    "cut at 2": ([(2,)] * 5, RANKS, {}),
    "U-shape 1–3": ([(1, 3)] * 5, RANKS, {}),
    "mixed": (MIXED, RANKS, {}),
    "mixed, kept": (MIXED, RANKS, {"reinitialise": False}),
    "shared tail": (MIXED, [2] * 5, {"shared": True}),
}


def problem(cuts, ranks=RANKS):
    """Return a network and five clients with these cuts, who learn what another network says."""
    network, target = Network(0), Network(1)
    network.embedding, network.output = target.embedding, target.output
    clients = []
    for i, (cut, rank, rows) in enumerate(zip(cuts, ranks, [12, 24, 18, 12, 30], strict=True)):
        draw = torch.Generator().manual_seed(i)
        x = torch.randint(i, WORDS, (rows, 3), generator=draw)
        y = target.forward(target.base, x, 0, BLOCKS).argmax(-1)
        micro = [*zip(x.split(6), y.split(6), strict=True)]
        steps = [micro[j : j + 2] for j in range(0, len(micro), 2)] * 2
        every = dict.fromkeys(network.sites, rank)
        clients.append(Client(every, 2.0 * (1 + i % 2), cut, rows, lambda _, steps=steps: steps))
    return network, clients


if __name__ == "__main__":
    print("round  " + "  ".join(f"{name:>11}" for name in RUNS))
    runs = [hsplitlora(*problem(cuts, r), 6, **options) for cuts, r, options in RUNS.values()]
    for t, results in enumerate(zip(*runs, strict=True), start=1):
        print(f"{t:5}  " + "  ".join(f"{loss:11.6f}" for _, loss in results))
