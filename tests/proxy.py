"""A TCP proxy on 127.0.0.1 that delays, slows down, cuts and blocks what goes through it.

    with Proxy("127.0.0.1:5000", delay=0.01, rate=12_500_000) as proxy:
        dial(proxy.address)     # 10 ms each way, 100 Mbit/s each way
        proxy.cut()             # all connections break now; new ones are welcome
        proxy.block()           # all break, and new ones break at once, until unblock()

Standard library only. One thread per connection and direction reads, another one writes.
"""

import contextlib
import queue
import socket
import threading
import time
from collections.abc import Callable

PIECE = 16384
"""Bytes that are read at a time."""
HELD = 256
"""Pieces that are on the way in one direction: 4 MiB, above the product of 100 Mbit/s and 0.3 s."""


class Proxy:
    """Carries connections to `target` (host:port); `address` is where it listens.

    Every byte is `delay` seconds late and goes at no more than `rate` bytes a second, each way, of
    all connections together. `watch(direction, data)`, with "up" or "down", is called for each
    piece before it is passed on, and may call `cut`. `carried` counts bytes each way.
    """

    def __init__(
        self,
        target: str,
        *,
        delay: float = 0.0,
        rate: float | None = None,
        watch: Callable[[str, bytes], None] | None = None,
    ):
        host, _, port = target.rpartition(":")
        self._target = host.strip("[]"), int(port)
        self.delay, self.rate, self.watch = delay, rate, watch
        self.carried = {"up": 0, "down": 0}
        self.connections = 0
        self._open: set[socket.socket] = set()
        self._free = {"up": 0.0, "down": 0.0}
        self._blocked = self._closed = False
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self) -> "Proxy":
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._closed = True
        with contextlib.suppress(OSError):  # wakes `accept`
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()

    def cut(self) -> None:
        """Break all connections; what is on the way is lost."""
        with self._lock:
            ends, self._open = self._open, set()
        for end in ends:
            _break(end)

    def block(self) -> None:
        """Break all connections, and new ones as they come."""
        self._blocked = True
        self.cut()

    def unblock(self) -> None:
        """Let new connections through again."""
        self._blocked = False

    def _accept(self) -> None:
        while not self._closed:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self._blocked:
                _break(client)
                continue
            try:
                server = socket.create_connection(self._target, timeout=10)
            except OSError:
                _break(client)
                continue
            server.settimeout(None)
            for end in (client, server):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                self._open |= {client, server}
                self.connections += 1
            for direction, source, sink in (("up", client, server), ("down", server, client)):
                pieces: queue.Queue[tuple[float, bytes]] = queue.Queue(HELD)
                for work, end in ((self._read, source), (self._write, sink)):
                    threading.Thread(
                        target=work, args=(direction, end, pieces), daemon=True
                    ).start()

    def _read(self, direction: str, source: socket.socket, pieces: queue.Queue) -> None:
        data = b"start"
        while data:
            try:
                data = source.recv(PIECE)
            except OSError:
                data = b""
            if data and self.watch is not None:
                self.watch(direction, data)
            pieces.put((self._due(direction, len(data)), data))

    def _due(self, direction: str, count: int) -> float:
        """Return when a piece has come through."""
        now = time.monotonic()
        with self._lock:
            self.carried[direction] += count
            start = max(now, self._free[direction])
            self._free[direction] = start + (count / self.rate if self.rate else 0.0)
            return self._free[direction] + self.delay

    def _write(self, direction: str, sink: socket.socket, pieces: queue.Queue) -> None:
        broken = False
        while True:
            due, data = pieces.get()
            if not broken and (wait := due - time.monotonic()) > 0:
                time.sleep(wait)
            if not data:
                break
            try:
                if not broken:
                    sink.sendall(data)
            except OSError:
                broken = True  # the reader's pieces are to be taken all the same
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)


def _break(end: socket.socket) -> None:
    """Close a connection at once, without what waits to be sent."""
    with contextlib.suppress(OSError):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
    with contextlib.suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)
    end.close()
