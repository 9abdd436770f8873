"""What `polyrank init` writes runs as it stands, on the embedded data and on files of one's own."""

import csv
import json
from pathlib import Path

import pytest

from polyrank.cli import main

ROWS = [(f"Say {word} twice.", f"{word} {word}", "ab"[i % 2]) for i, word in enumerate(
    ["red", "blue", "tea", "sun", "rain", "sea", "ice", "oak"] * 6
)]  # fmt: skip

SHORT = ("rounds=1", "local.steps=1", "sampling.number=2", "data.limit=10")
SHORT += ("evaluation.generate=1", "evaluation.own_rank=false", "evaluation.final_clients=2")


def run(*arguments: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*arguments])
    assert ended.value.code == 0, arguments


@pytest.mark.parametrize("kind", ["sample", "jsonl", "csv"])
def test_what_init_writes_runs_as_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.chdir(tmp_path)
    given: tuple[str, ...] = ()
    if kind == "jsonl":
        lines = [json.dumps({"question": ask, "answer": say}) for ask, say, _ in ROWS]
        Path("rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
        given = ("--data", "rows.jsonl", "--clients", "6")
    if kind == "csv":
        with Path("rows.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([("prompt", "reply", "who"), *ROWS])
        given = ("--data", "rows.csv", "--by", "who")
    run("init", "my.toml", *given)
    run("run", "my.toml", *SHORT)
    assert (tmp_path / "runs" / "my" / "adapter" / "adapter_config.json").is_file()
