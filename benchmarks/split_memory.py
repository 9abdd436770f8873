"""The memory of a client that holds only its first blocks: a process for each side, measured.

    python benchmarks/split_memory.py            # a Llama of 1 GB, cut at block 2; minutes
    python benchmarks/split_memory.py --quick    # a small one, to see that it runs
    python benchmarks/split_memory.py --device cuda --dtype bfloat16 --layers 32 --hidden 4096

A random model is written to a temporary folder. Then three processes train one client's adapter: a
*client* that has loaded the blocks below the cut and a *server* that has loaded the others, joined
by gRPC over TLS, and afterwards one with the whole model, by `train_cohort`. Each reports the most
memory that it ever had resident (VmHWM of Linux's /proc/self/status, libraries included) and, on a
GPU, the most that torch has allocated there. The adapters of client and server together are
compared with that of the whole. Exit status 1 if the client is not below its budget, that budget
not below the weights of the whole model, or the adapters differ.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from polyrank.aggregation.types import Assignment
from polyrank.algebra import Adapter, LowRank
from polyrank.codecs import codec
from polyrank.data.types import Encoded
from polyrank.model import LoadedModel, Span, load_model
from polyrank.planning import CutPoint
from polyrank.training import Job, LocalTraining, train_cohort
from polyrank.training.split import ServerParts, SplitJob, SplitSettings, train_client_part
from polyrank.transport import FrameLimits
from polyrank.transport.remote import Credentials, GrpcLink, SplitServer, new_identity

NAME = "weakest"
CREDENTIALS = "credentials.json"
"""The file by which the client learns how to reach the server."""
SCALE = 2.0
MIB = 2**20
WORDS = {"<pad>": 0, "</s>": 2, "<unk>": 3, "word": 4}


@dataclass(frozen=True)
class Plan:
    """The model, where it is cut, and the work: a rank, rows of a length, and optimizer steps."""

    layers: int = 20
    hidden: int = 1024
    vocabulary: int = 8192
    cut: int = 2
    rank: int = 8
    length: int = 32
    batch: int = 2
    accumulation: int = 2
    steps: int = 3
    wire: str = "float32"
    dtype: str = "float32"
    device: str = "cpu"
    threads: int = 1
    timeout: int = 900


@dataclass(frozen=True)
class Process:
    """What a process reports, in bytes: after its imports, with its weights, and at its peak."""

    imports: int
    weights: int
    peak: int
    device_peak: int
    seconds: float
    metrics: Mapping[str, float]


QUICK = Plan(layers=6, hidden=256, vocabulary=2048, cut=1)


def main() -> int:
    if len(sys.argv) > 1 and sys.argv[1] in ROLES:
        take_part(sys.argv[1], Path(sys.argv[2]))
        return 0
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budget", type=int, help="MiB; default: 70 %% of the whole weights")
    parser.add_argument("--quick", action="store_true", help="a small model, and no budget")
    for one in fields(Plan):
        parser.add_argument(f"--{one.name}", type=type(one.default), default=None)
    options = parser.parse_args()
    given = {one.name: getattr(options, one.name) for one in fields(Plan)}
    base = QUICK if options.quick else Plan()
    plan = Plan(**{**asdict(base), **{k: v for k, v in given.items() if v is not None}})
    with tempfile.TemporaryDirectory() as folder:
        found, apart = measure(Path(folder), plan)
    return report(plan, found, apart, options.budget, judged=not options.quick)


def report(
    plan: Plan, found: Mapping[str, Process], apart: float, budget: int | None, *, judged: bool
) -> int:
    """Print what was measured; return 1 if it is not what split training promises."""
    whole = found["whole"].weights / MIB
    allowed = 0.7 * whole if budget is None else budget
    print(
        f"random Llama of {plan.layers} blocks, width {plan.hidden}, vocabulary {plan.vocabulary}, "
        f"{plan.dtype}: {whole:,.0f} MiB of weights; cut at {plan.cut}, wire {plan.wire}, "
        f"{plan.steps} steps of {plan.accumulation} × {plan.batch} rows of ≤ {plan.length} tokens, "
        f"rank {plan.rank}, {plan.device}, torch {torch.__version__}, {plan.threads} thread(s)\n"
    )
    gpu = plan.device != "cpu"
    print(f"| process | weights, MiB | after imports | peak |{' on the GPU |' if gpu else ''}")
    print(f"| --- | ---: | ---: | ---: |{' ---: |' if gpu else ''}")
    for role, one in found.items():
        numbers = [one.weights, one.imports, one.peak, *([one.device_peak] if gpu else [])]
        print(f"| {role} | " + " | ".join(f"{number / MIB:,.0f}" for number in numbers) + " |")
    peak = found["client"].device_peak if gpu else found["client"].peak
    metrics = found["client"].metrics
    print(
        f"\nclient {peak / MIB:,.0f} MiB, its budget {allowed:,.0f} MiB, the whole model's weights "
        f"{whole:,.0f} MiB\nsent {metrics['wire_up'] / MIB:.2f} MiB, received "
        f"{metrics['wire_down'] / MIB:.2f} MiB\nwhat was learned differs by {apart:.1e} of its norm"
    )
    kept = peak / MIB < allowed < whole or not judged
    # A base in bfloat16 rounds otherwise if a clip factor differs in its last digit.
    same = apart < 1e-3 or not plan.wire == plan.dtype == "float32"
    return 0 if kept and same else 1


def write_model(work: Path, plan: Plan) -> None:
    """Write a random Llama with a tokenizer to the folder `base`."""
    # Imported where it is used: the processes that are measured have no need of it.
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=plan.vocabulary,
        hidden_size=plan.hidden,
        intermediate_size=plan.hidden * 11 // 4,
        num_hidden_layers=plan.layers,
        num_attention_heads=plan.hidden // 64,
        max_position_embeddings=2048,
        dtype=getattr(torch, plan.dtype),
    )
    LlamaForCausalLM(config).to(getattr(torch, plan.dtype)).save_pretrained(work / "base")
    words = Tokenizer(models.WordLevel(WORDS, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(work / "base")


# --- the processes --------------------------------------------------------------------------------


def measure(work: Path, plan: Plan) -> tuple[dict[str, Process], float]:
    """Train cut and whole in processes of their own; return their reports and how far they differ.

    The distance is that of the adapters, relative to what the whole client has learned. Raises
    RuntimeError with what a process said if it fails; none is left running.
    """
    (work / "plan.json").write_text(json.dumps(asdict(plan)))
    write_model(work, plan)
    run(work, plan, ["client", "server"])
    run(work, plan, ["whole"])
    roles = ("client", "server", "whole")
    found = {role: Process(**json.loads((work / f"{role}.json").read_text())) for role in roles}
    factors = {role: load_file(work / f"{role}.safetensors") for role in roles}
    return found, difference({**factors["client"], **factors["server"]}, factors["whole"])


def run(work: Path, plan: Plan, roles: Sequence[str]) -> None:
    """Start a process for each role and wait until all are done, or one fails or takes too long."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(plan.threads), "HF_HUB_OFFLINE": "1"}
    started: dict[str, subprocess.Popen[bytes]] = {}
    deadline = time.monotonic() + plan.timeout
    try:
        for role in roles:
            with (work / f"{role}.log").open("wb") as log:
                started[role] = subprocess.Popen(
                    [sys.executable, __file__, role, str(work)],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=environment,
                )
        while any(one.poll() is None for one in started.values()):
            failed = [role for role, one in started.items() if one.poll() not in (None, 0)]
            if failed or time.monotonic() > deadline:
                break
            time.sleep(0.05)
        for role, one in started.items():
            if one.poll() != 0:
                said = (work / f"{role}.log").read_text()[-2000:]
                raise RuntimeError(f"{role}: exit status {one.poll()} (None: stopped)\n{said}")
    finally:
        for one in started.values():
            if one.poll() is None:
                one.kill()
            one.wait()


def take_part(role: str, work: Path) -> None:
    """Do what a process of this role does, and write its report and its factors."""
    plan = Plan(**json.loads((work / "plan.json").read_text()))
    torch.set_num_threads(plan.threads)
    imports, start = peak(), time.monotonic()
    model, adapter, metrics = ROLES[role](work, plan)
    held = [p for p in model.module.parameters() if not p.is_meta]
    on_device = torch.cuda.max_memory_allocated() if model.device.type == "cuda" else 0
    done = Process(
        imports=imports,
        weights=sum(p.nbytes for p in held),
        peak=peak(),
        device_peak=on_device,
        seconds=time.monotonic() - start,
        metrics=metrics,
    )
    tensors = {
        f"{site}.{which}": getattr(delta, which).cpu().contiguous()
        for site, delta in adapter.items()
        for which in ("a", "b")
    }
    save_file(tensors, work / f"{role}.safetensors")
    (work / f"{role}.json").write_text(json.dumps(asdict(done)))


def peak() -> int:
    """Return the most memory that this process has ever had resident, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024


Outcome = tuple[LoadedModel, Adapter, Mapping[str, float]]


def client(work: Path, plan: Plan) -> Outcome:
    model = load_model(
        work / "base", device=plan.device, dtype=plan.dtype, spans=[Span(0, plan.cut)]
    )
    settings = SplitSettings(wire=plan.wire)  # type: ignore[arg-type]  # checked there
    one = SplitJob(job_of(model, plan), CutPoint(plan.cut), round=1)
    while not (work / CREDENTIALS).exists():
        time.sleep(0.05)
    credentials = Credentials.from_dict(json.loads((work / CREDENTIALS).read_text()))
    trained = train_client_part(model, one, GrpcLink(credentials), settings)
    if trained.failure is not None:
        raise RuntimeError(trained.failure)
    return model, trained.adapter, trained.metrics


def server(work: Path, plan: Plan) -> Outcome:
    model = load_model(work / "base", device=plan.device, dtype=plan.dtype, spans=[Span(plan.cut)])
    own = SplitJob(job_of(model, plan), CutPoint(plan.cut), round=1)
    limits = FrameLimits(plan.batch * plan.length, plan.hidden, codec(plan.wire))
    with (
        ServerParts(model, [own.at_server(model)]) as parts,
        SplitServer("127.0.0.1:0", new_identity(["127.0.0.1"]), "benchmark") as listening,
    ):
        opened = listening.open([(parts, [NAME])], 1, 0, {NAME: limits}, float(plan.timeout))
        partial = work / f"{CREDENTIALS}.part"
        partial.write_text(json.dumps(opened[NAME].to_dict()))
        partial.rename(work / CREDENTIALS)
        while not (work / "client.json").exists():  # written when the client is done
            time.sleep(0.05)
        listening.close()
        return model, parts.adapter(NAME), {}


def whole(work: Path, plan: Plan) -> Outcome:
    model = load_model(work / "base", device=plan.device, dtype=plan.dtype)
    (trained,) = train_cohort(model, [job_of(model, plan)])
    return model, trained.adapter, trained.metrics


ROLES = {"client": client, "server": server, "whole": whole}


# --- the work -------------------------------------------------------------------------------------


def job_of(model: LoadedModel, plan: Plan) -> Job:
    """Return the client's work at the sites that `model` holds, the same whoever asks."""
    start = {site: start_of(site, *shape, plan.rank) for site, shape in model.spec.shapes.items()}
    source = torch.Generator().manual_seed(1)
    rows = []
    for i in range(plan.steps * plan.accumulation * plan.batch):
        size = int(torch.randint(plan.length // 2, plan.length + 1, (1,), generator=source))
        ids = torch.randint(4, plan.vocabulary, (size,), generator=source)
        rows.append(Encoded(tuple(ids.tolist()), size // 2, size // 2, i))
    local = LocalTraining(batch=plan.batch, accumulation=plan.accumulation, lr=1e-3, clip=0.5)
    return Job(NAME, Assignment(Adapter(start), dict.fromkeys(start, SCALE)), rows, local, seed=7)


def start_of(site: str, m: int, n: int, rank: int) -> LowRank:
    """Return random factors of a site, the same in every process."""
    source = torch.Generator().manual_seed(zlib.crc32(site.encode()))
    b = 1e-2 * torch.randn(m, rank, generator=source)
    return LowRank(b, torch.randn(rank, n, generator=source) / n**0.5)


def difference(parts: Mapping[str, torch.Tensor], all_: Mapping[str, torch.Tensor]) -> float:
    """Return ‖parts − all‖ / ‖all − start‖ over all factors' products."""
    if parts.keys() != all_.keys():
        raise RuntimeError(f"other sites: {sorted(parts.keys() ^ all_.keys())[:5]}")
    apart = moved = 0.0
    for site in {name.rpartition(".")[0] for name in all_}:
        one, other = (LowRank(of[f"{site}.b"], of[f"{site}.a"]) for of in (parts, all_))
        apart += (one - other).norm() ** 2
        moved += (other - start_of(site, *other.shape, other.rank)).norm() ** 2
    return float((apart / moved) ** 0.5)


if __name__ == "__main__":
    sys.exit(main())
