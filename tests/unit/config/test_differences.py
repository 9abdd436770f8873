from polyrank.config.differences import differences
from polyrank.config.reading import checked


def recipe(**changes):
    content = {
        "model": {"source": "sample"},
        "data": {"source": "sample"},
        "fleet": {"distribution": {"T1": 0.5, "T2": 0.5}, "types": {"T1": 2, "T2": 4}},
    }
    return checked({**content, **changes}, "recipe")


def test_every_key_that_differs_is_named_with_both_values() -> None:
    other = recipe(
        rounds=3,
        local={"lr": 1e-2},
        fleet={"distribution": {"T1": 1.0}, "types": {"T1": 2, "T2": 8}},
    )
    assert differences(recipe(), other) == [
        ("fleet.distribution.T1", 0.5, 1.0),
        ("fleet.distribution.T2", 0.5, None),
        ("fleet.types.T2", 4, 8),
        ("local.lr", recipe().local.lr, 1e-2),
        ("rounds", 10, 3),
    ]


def test_a_default_that_is_written_out_is_no_difference() -> None:
    assert differences(recipe(), recipe(rounds=10, local={"lr": recipe().local.lr})) == []


def test_a_section_that_one_recipe_leaves_out_is_one_difference() -> None:
    ((key, before, now),) = differences(recipe(), recipe(early_stopping={"patience": 2}))
    assert (key, before, now["patience"]) == ("early_stopping", None, 2)
