"""Federations whose clients are reached by letters."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from federations import LOCAL, MEASURED, clients, fleet, one_block
from letters import Letters, Trouble
from polyrank.data import Skipped
from polyrank.data.types import ClientData
from polyrank.federation import Conduct, Federation, prepare
from polyrank.federation.remote.client import ClientSide
from polyrank.federation.remote.engine import Remote
from polyrank.federation.remote.examiner import RemoteExaminer
from polyrank.federation.remote.packets import Terms, read_profile
from polyrank.federation.remote.work import clients_of, work_of
from polyrank.federation.settings import Encoding, Evaluation
from polyrank.model import LoadedModel
from polyrank.planning import Fleet, Split
from polyrank.training import LocalTraining
from polyrank.training.split import SplitSettings


@dataclass
class Held:
    """A model that is there already, for `ClientSide`."""

    model: LoadedModel

    def bare(self) -> LoadedModel:
        return self.model

    def whole(self) -> LoadedModel:
        return self.model

    def head(self, cut: Split) -> LoadedModel:
        return self.model


def machine(
    names: list[str],
    data: Mapping[str, ClientData] | None = None,
    model: LoadedModel | None = None,
    *,
    local: LocalTraining = LOCAL,
    evaluation: Evaluation = MEASURED,
    split: SplitSettings | None = None,
    terms: Terms | None = None,
) -> ClientSide:
    """Return the machine of some clients of a federation's data."""
    everyone = clients() if data is None else data

    def work(model: LoadedModel) -> Mapping[str, Any]:
        made, _ = prepare(everyone, model, Encoding())
        return {id: one for id, one in made.items() if id in names}

    return ClientSide(
        Held(model or one_block()),
        work,
        local,
        split or SplitSettings(),
        evaluation,
        terms or Terms(),
    )


def machines(data: Mapping[str, ClientData] | None = None, **rest: Any) -> dict[int, ClientSide]:
    """Return a machine for every client, numbered from 1."""
    data = clients() if data is None else data
    return {number: machine([id], data, **rest) for number, id in enumerate(sorted(data), 1)}


def away(
    hosts: Mapping[int, ClientSide],
    out: Any = None,
    *,
    trouble: Trouble | None = None,
    model: LoadedModel | None = None,
    local: LocalTraining = LOCAL,
    conduct: Conduct | None = None,
    desk: Any = None,
    types: Fleet | None = None,
    tell: Callable[[str], None] = lambda _: None,
    **rest: Any,
) -> tuple[Federation, Letters]:
    """Return a federation whose clients are on these machines, and the post between them."""
    post = Letters(hosts)
    tickets = post.send([_hello(node) for node in post.nodes()], 1.0)
    profiles = {
        node: read_profile(one.payload or b"")
        for node, one in zip(post.nodes(), post.receive(dict.fromkeys(tickets, 0)), strict=True)
    }
    post.trouble = trouble
    hosted = [one for profile in profiles.values() for one in profile.hosted]
    homes = {one.client: node for node, profile in profiles.items() for one in profile.hosted}
    work = {one.client: work_of(one) for one in sorted(hosted, key=lambda one: one.client)}
    model, conduct = model or one_block(), conduct or Conduct(evaluation=MEASURED, cohort=1)
    engine = Remote(
        post, homes, model, work, local, conduct.split, conduct.faults.deadline, desk, tell
    )
    examiner = RemoteExaminer(post, homes, lambda id: id not in engine.cut, 5.0, tell, lambda: None)
    made = Federation(
        model,
        clients_of(hosted),
        types or fleet(clients_of(hosted)),
        rest.pop("rule", None),
        local,
        conduct,
        out=out,
        prepared=(work, Skipped()),
        engine=engine,
        examiner=examiner,
        **rest,
    )
    return made, post


def _hello(node: int) -> Any:
    from polyrank.federation.remote.post import Letter

    return Letter(node, "hello", b"")
