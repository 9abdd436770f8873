"""Messages of split training as frames, carried over links."""

from polyrank.transport.frames import decode, encode
from polyrank.transport.in_process import InProcessLink, InProcessLinks
from polyrank.transport.layout import FrameLimits
from polyrank.transport.serving import ServingSettings

__all__ = [
    "FrameLimits",
    "InProcessLink",
    "InProcessLinks",
    "ServingSettings",
    "decode",
    "encode",
]
