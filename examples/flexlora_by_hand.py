"""FlexLoRA written out by hand: plain torch, float64, dense matrices, nothing of polyrank.

A small network with two weight matrices is adapted by four clients of unequal rank, α, data and
size. Each round every client gets a truncation of the server's D, trains it on its own data, and
returns its factors; the server adds the full-size updates and takes one SVD per matrix.

    python examples/flexlora_by_hand.py

It is meant to be read from top to bottom, and it is the oracle that the library is tested against.
Bai et al., arXiv 2402.11505; mode "delta" and whom to credit: docs/explanation/methods.md.
"""

import math
from dataclasses import dataclass

import torch

F64 = torch.float64
SHAPES = {"hidden": (12, 8), "output": (6, 12)}  # out × in


@dataclass
class Client:
    """What one client is: its rank and α (so s = α/r), and its examples."""

    rank: int
    alpha: float
    x: torch.Tensor
    y: torch.Tensor

    @property
    def s(self):
        """The factor of ΔW = s·B A."""
        return self.alpha / self.rank


def problem():
    """Return the frozen weights W₀ and four clients, whose targets come from W₀ + a change."""
    draw = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=draw, dtype=F64)

    base = {site: normal(m, n) / math.sqrt(n) for site, (m, n) in SHAPES.items()}
    target = {site: w + normal(*w.shape) / 4 for site, w in base.items()}
    clients = []
    for rank, alpha, examples in [(1, 2, 40), (2, 2, 80), (4, 8, 20), (6, 6, 60)]:
        x = normal(examples, 8) + normal(8) / 2
        clients.append(Client(rank, alpha, x, predict(target, x)))
    return base, clients


def predict(weights, x):
    return torch.tanh(x @ weights["hidden"].T) @ weights["output"].T


def loss(base, delta, x, y):
    """Return the mean squared error of the network with weights W₀ + ΔW."""
    return (predict({site: base[site] + delta[site] for site in base}, x) - y).square().mean()


def fresh_rows(site, rank, n, seed):
    """Return LoRA's initial A, uniform in ±1/√n; the first rows do not depend on the rank."""
    draw = torch.Generator().manual_seed(1000 * seed + len(site))
    return (torch.rand(rank, n, generator=draw, dtype=F64) * 2 - 1) / math.sqrt(n)


def assign(d, rank, s, fresh):
    """Return B = UΣ/s and A = Vᵀ of the first `rank` directions; dead ones get B = 0, A fresh."""
    u, sigma, vt = torch.linalg.svd(d, full_matrices=False)
    b, a = u[:, :rank] * sigma[:rank] / s, vt[:rank].clone()
    dead = sigma[:rank] <= 1e-6 * sigma[0]
    b[:, dead], a[dead] = 0, fresh[dead]
    return b, a


def truncate(d, rank):
    """Return T_r(D), the best approximation of D of that rank."""
    u, sigma, vt = torch.linalg.svd(d, full_matrices=False)
    return (u[:, :rank] * sigma[:rank]) @ vt[:rank]


def train(base, frozen, factors, client, steps=5, optimizer="adamw", lr=0.05):
    """Train B and A on the client's data and return them; the base and `frozen` stay as they are.

    `factors` maps a site to (B, A), `frozen` a site to a matrix that is active but not trained.
    """
    factors = {
        site: [factor.clone().requires_grad_() for factor in pair] for site, pair in factors.items()
    }
    chosen = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[optimizer]
    stepper = chosen([f for pair in factors.values() for f in pair], lr=lr, weight_decay=0.01)
    for _ in range(steps):
        stepper.zero_grad()
        delta = {site: frozen[site] + client.s * b @ a for site, (b, a) in factors.items()}
        loss(base, delta, client.x, client.y).backward()
        stepper.step()
    return {site: (b.detach(), a.detach()) for site, (b, a) in factors.items()}


def flexlora(base, clients, mode, rounds, fresh=fresh_rows, **training):
    """Yield (D per site, mean loss over all examples) after each round."""
    server_rank = max(client.rank for client in clients)
    examples = sum(len(client.x) for client in clients)
    weights = [len(client.x) / examples for client in clients]
    d = {site: torch.zeros(shape, dtype=F64) for site, shape in SHAPES.items()}
    for t in range(rounds):
        total = {site: torch.zeros(shape, dtype=F64) for site, shape in SHAPES.items()}
        for w, client in zip(weights, clients, strict=True):
            assigned, frozen = {}, {}
            for site, (_, n) in SHAPES.items():
                new = fresh(site, client.rank, n, t)
                assigned[site] = assign(d[site], client.rank, client.s, new)
                start = client.s * assigned[site][0] @ assigned[site][1]
                frozen[site] = d[site] - start if mode == "tail-in-base" else 0 * start
            trained = train(base, frozen, assigned, client, **training)
            for site, (b, a) in trained.items():
                update = client.s * b @ a
                if mode in ("delta", "tail-in-base"):
                    update = d[site] + update - client.s * assigned[site][0] @ assigned[site][1]
                total[site] += w * update
        d = {site: truncate(total[site], server_rank) for site in SHAPES}
        losses = [loss(base, d, client.x, client.y) for client in clients]
        yield d, float(sum(w * one for w, one in zip(weights, losses, strict=True)))


if __name__ == "__main__":
    base, clients = problem()
    modes = ("replace", "delta", "tail-in-base")
    print("round  " + "  ".join(f"{mode:>12}" for mode in modes))
    runs = [flexlora(base, clients, mode, rounds=10) for mode in modes]
    for t, results in enumerate(zip(*runs, strict=True), start=1):
        print(f"{t:5}  " + "  ".join(f"{value:12.6f}" for _, value in results))
