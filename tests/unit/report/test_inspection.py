from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from polyrank.report.inspection import MOST_GROUPS, MOST_ROUNDS, page
from polyrank.run import RoundRecord
from polyrank.runner.inspect import RunInspection, SiteEnergy, block_and_kind

KINDS = ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj")


def record(number: int, energy: dict[str, list[float]]) -> RoundRecord:
    return RoundRecord(
        schema=1,
        round=number,
        attempt=0,
        clients=["a", "b"],
        ranks={"T1": 2},
        loss=2.0,
        tokens=10,
        bytes_down=2**20,
        bytes_up=2**20,
        energy=energy,
        rejected={},
        abandoned=[],
        evaluation=None,
        seconds={"total": 1.0},
    )


def inspected(blocks: int, rounds: int = 2, lost: float = 0.25, **changes: Any) -> RunInspection:
    """A run whose last block's down_proj lost a share of its energy; every site holds 4."""
    energy = {f"model.layers.{b}.{kind}": [4.0, 0.0] for b in range(blocks) for kind in KINDS}
    energy[f"model.layers.{blocks - 1}.mlp.down_proj"] = [4.0, 4.0 * lost]
    values: dict[str, Any] = {
        "folder": Path("runs/x"),
        "method": "flexlora",
        "finished": True,
        "records": [record(n + 1, energy) for n in range(rounds)],
        "fleet": {"clients": {"a": "T1", "b": "T1"}, "ranks": {"T1": dict.fromkeys(energy, 2)}},
        "result_round": rounds,
        "notes": [],
    }
    return RunInspection(**{**values, **changes})


def shown(run: RunInspection, width: int = 80) -> list[str]:
    out = StringIO()
    console = Console(file=out, width=width)
    for part in page(run):
        console.print(part)
    return out.getvalue().splitlines()


def after(lines: Sequence[str], title: str) -> list[list[str]]:
    """The rows of a table."""
    at = next(i for i, line in enumerate(lines) if title in line)
    rows = []
    for line in lines[at + 4 :]:
        if not line.strip():
            break
        rows.append(line.split())
    return rows


@pytest.mark.parametrize(
    ("site", "expected"),
    [
        ("model.layers.10.self_attn.q_proj", ("10", "self_attn.q_proj")),
        ("transformer.h.3.attn.c_attn", ("3", "attn.c_attn")),
        ("lm_head", ("–", "lm_head")),
        ("model.layers.2.experts.7.up", ("2", "experts.7.up")),
    ],
)
def test_a_site_is_a_block_and_a_kind(site: str, expected: tuple[str, str]) -> None:
    assert block_and_kind(site) == expected


def test_energy_is_summed_by_kind_and_by_block() -> None:
    run = inspected(blocks=3)
    assert run.by_kind == {
        "mlp.down_proj": SiteEnergy(12.0, 1.0),
        "self_attn.k_proj": SiteEnergy(12.0),
        "self_attn.q_proj": SiteEnergy(12.0),
    }
    assert run.by_block == {
        "0": SiteEnergy(12.0),
        "1": SiteEnergy(12.0),
        "2": SiteEnergy(12.0, 1.0),
    }


def test_the_page_of_a_large_model_fits_a_screen_of_80_columns() -> None:
    lines = shown(inspected(blocks=70, rounds=100))
    assert max(map(len, lines)) <= 80
    assert len(lines) < 90
    rounds = [line.split()[0] for line in lines if line.split()[1:2] == ["2.0000"]]
    assert len(rounds) == MOST_ROUNDS
    assert (rounds[0], rounds[-1]) == ("1", "100")
    assert any(f"{MOST_ROUNDS} of 100 rounds" in line for line in lines)


def test_shares_of_energy_add_up_and_the_loss_is_where_it_was() -> None:
    lines = shown(inspected(blocks=70))
    blocks = after(lines, "by block")
    assert len(blocks) <= MOST_GROUPS
    assert (blocks[0][0], blocks[-1][0]) == ("0–5", "66–69")
    shares = [float(row[1].rstrip("%")) for row in blocks]
    assert sum(shares) == pytest.approx(100, abs=1)
    assert {row[-1] for row in blocks[:-1]} == {"0.00%"}
    assert blocks[-1][-1] == "2.08%"  # 1 of 48.
    worst = after(lines, "most energy lost")
    assert worst == [["model.layers.69.mlp.down_proj", "2", "25.00%"]]


def test_without_losses_no_matrix_is_blamed() -> None:
    lines = shown(inspected(blocks=2, lost=0.0))
    assert any("lost no energy" in line for line in lines)


def test_a_run_without_a_round_is_shown() -> None:
    run = inspected(blocks=2, rounds=0, records=[], result_round=0, finished=False)
    text = " ".join(shown(run))
    assert "0 rounds done, not finished" in text
    assert "no round is finished yet" in text
    assert run.to_json()["sites"] == {}


def test_early_stopping_names_the_round_of_the_result() -> None:
    text = " ".join(shown(inspected(blocks=2, rounds=3, result_round=1)))
    assert "early stopping keeps the adapter of round 1" in text
