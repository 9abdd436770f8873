"""A split client's machine as a process: carries a request out, and kills at a phase of a step.

    python split_client.py CONFIG CLIENT_TOML REQUEST ANSWER [PHASE VICTIM]

The files hold a Flower run config as JSON, the client.toml, the packet of a request, and take the
packet of its answer. VICTIM is a process, 0: this one. The product has no such hooks; what is
changed here is the link that the client's machine opens.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

PHASES = ("before the request", "after the request", "after the reply", "before the update")
AT = 7
"""The request at which it happens: the fourth step's activations."""


def main(config: str, client: str, request: str, answer: str, phase: str = "", victim: str = "0"):
    from polyrank.remote.hosting import client_node
    from polyrank.transport.pending import PendingFrame
    from polyrank.transport.remote import GrpcLink

    def kill() -> None:
        os.kill(int(victim) or os.getpid(), signal.SIGKILL)

    submit, result = GrpcLink.submit, PendingFrame.result
    count = {"sent": 0, "came": 0}

    def submitting(self, request):
        count["sent"] += 1
        now = count["sent"] == AT
        if now and phase == PHASES[0]:
            kill()
        pending = submit(self, request)
        if now and phase == PHASES[1]:
            time.sleep(0.5)  # until it is on its way
            kill()
        return pending

    def receiving(self):
        found = result(self)
        count["came"] += 1
        if count["came"] == AT and phase == PHASES[2]:
            kill()
        return found

    GrpcLink.submit, PendingFrame.result = submitting, receiving
    node = client_node(json.loads(Path(config).read_text(encoding="utf-8")), {"client": client})
    made = node.answer("train", Path(request).read_bytes())
    if phase == PHASES[3]:
        kill()
    Path(answer).write_bytes(made)


if __name__ == "__main__":
    main(*sys.argv[1:])
