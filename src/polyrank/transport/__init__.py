"""How the messages of split training travel: codec, frames, and links that carry them."""

from polyrank.transport.codec import CODECS, Codec, Coding, codec
from polyrank.transport.frames import decode, encode
from polyrank.transport.in_process import InProcessLink, InProcessLinks
from polyrank.transport.layout import Limits
from polyrank.transport.pipe import PipeLink, serve_pipe

__all__ = [
    "CODECS",
    "Codec",
    "Coding",
    "InProcessLink",
    "InProcessLinks",
    "Limits",
    "PipeLink",
    "codec",
    "decode",
    "encode",
    "serve_pipe",
]
