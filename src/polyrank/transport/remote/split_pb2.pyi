from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Up(_message.Message):
    __slots__ = ("hello", "proof", "part", "alive", "bye")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    PROOF_FIELD_NUMBER: _ClassVar[int]
    PART_FIELD_NUMBER: _ClassVar[int]
    ALIVE_FIELD_NUMBER: _ClassVar[int]
    BYE_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    proof: Proof
    part: Part
    alive: Alive
    bye: Bye
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., proof: _Optional[_Union[Proof, _Mapping]] = ..., part: _Optional[_Union[Part, _Mapping]] = ..., alive: _Optional[_Union[Alive, _Mapping]] = ..., bye: _Optional[_Union[Bye, _Mapping]] = ...) -> None: ...

class Down(_message.Message):
    __slots__ = ("challenge", "welcome", "part", "ended")
    CHALLENGE_FIELD_NUMBER: _ClassVar[int]
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    PART_FIELD_NUMBER: _ClassVar[int]
    ENDED_FIELD_NUMBER: _ClassVar[int]
    challenge: Challenge
    welcome: Welcome
    part: Part
    ended: Ended
    def __init__(self, challenge: _Optional[_Union[Challenge, _Mapping]] = ..., welcome: _Optional[_Union[Welcome, _Mapping]] = ..., part: _Optional[_Union[Part, _Mapping]] = ..., ended: _Optional[_Union[Ended, _Mapping]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("version", "run", "client", "round", "attempt", "first", "resume")
    class First(_message.Message):
        __slots__ = ("token", "secret")
        TOKEN_FIELD_NUMBER: _ClassVar[int]
        SECRET_FIELD_NUMBER: _ClassVar[int]
        token: bytes
        secret: bytes
        def __init__(self, token: _Optional[bytes] = ..., secret: _Optional[bytes] = ...) -> None: ...
    class Resume(_message.Message):
        __slots__ = ()
        def __init__(self) -> None: ...
    VERSION_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    FIRST_FIELD_NUMBER: _ClassVar[int]
    RESUME_FIELD_NUMBER: _ClassVar[int]
    version: int
    run: str
    client: str
    round: int
    attempt: int
    first: Hello.First
    resume: Hello.Resume
    def __init__(self, version: _Optional[int] = ..., run: _Optional[str] = ..., client: _Optional[str] = ..., round: _Optional[int] = ..., attempt: _Optional[int] = ..., first: _Optional[_Union[Hello.First, _Mapping]] = ..., resume: _Optional[_Union[Hello.Resume, _Mapping]] = ...) -> None: ...

class Challenge(_message.Message):
    __slots__ = ("nonce",)
    NONCE_FIELD_NUMBER: _ClassVar[int]
    nonce: bytes
    def __init__(self, nonce: _Optional[bytes] = ...) -> None: ...

class Proof(_message.Message):
    __slots__ = ("hmac",)
    HMAC_FIELD_NUMBER: _ClassVar[int]
    hmac: bytes
    def __init__(self, hmac: _Optional[bytes] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("credit", "longest", "silence")
    CREDIT_FIELD_NUMBER: _ClassVar[int]
    LONGEST_FIELD_NUMBER: _ClassVar[int]
    SILENCE_FIELD_NUMBER: _ClassVar[int]
    credit: int
    longest: int
    silence: float
    def __init__(self, credit: _Optional[int] = ..., longest: _Optional[int] = ..., silence: _Optional[float] = ...) -> None: ...

class Part(_message.Message):
    __slots__ = ("data", "last")
    DATA_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    last: bool
    def __init__(self, data: _Optional[bytes] = ..., last: _Optional[bool] = ...) -> None: ...

class Alive(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Bye(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Ended(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: str
    def __init__(self, reason: _Optional[str] = ...) -> None: ...
