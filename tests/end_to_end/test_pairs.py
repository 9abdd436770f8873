"""Every rule with every local method: it learns, or it is refused before anything is begun."""

import json
import math

import pytest

from polyrank.aggregation import RULES
from polyrank.training.methods import METHODS
from rules import ROWS
from runs import polyrank, write_recipe

RATES = {"fedavg": 0.5}
"""SGD's gradients are small here; AdamW takes the recipe's rate."""

pairs = [(rule, method) for rule in RULES for method in METHODS]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return write_recipe(tmp_path_factory.mktemp("recipe"))


def settings(rule, method):
    given = [f"aggregation.rule={rule}", f"local.method={method}"]
    given += [f"local.lr={RATES[method]}"] if method in RATES else []
    given += ["local.sparse_rounds=2"] if method == "slora" else []
    given += [] if RULES[rule].mixed_ranks else ["fleet.force=weakest"]
    return [*given, "rounds=4", "sampling.fraction=1", "evaluation.generate=0"]


@pytest.mark.parametrize(("rule", "method"), pairs)
def test_every_pair_learns_or_is_refused_with_its_reason(recipe, tmp_path, rule, method):
    out = tmp_path / "run"
    done = polyrank("run", recipe, *settings(rule, method), "--out", out)
    if method in ROWS[rule].excludes:
        assert done.code == 1
        assert RULES[rule].excludes[method] in " ".join(done.err.split())
        assert not out.exists(), "nothing is begun"
        return
    assert done.code == 0, done.err
    summary = json.loads((out / "summary.json").read_text())
    before, after = summary["base"]["seen"]["loss"], summary["final"]["seen"]["loss"]
    assert math.isfinite(after)
    assert after < before - 0.1
    assert (out / "adapter" / "adapter_model.safetensors").is_file()
