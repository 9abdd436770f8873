"""What an order brings a split client, the certificate in it, and the code made from the .proto."""

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography import x509

from grpc_rounds import IDENTITY
from polyrank.codecs import codec
from polyrank.errors import FrameError
from polyrank.transport import FrameLimits
from polyrank.transport import remote as package
from polyrank.transport.remote import Credentials, Identity, new_identity

CREDENTIALS = Credentials(
    "server.example:4711", IDENTITY.certificate, "run", 2, 0, "a", b"t" * 32,
    FrameLimits(64, 16, codec("bf16")), 30.0,
)  # fmt: skip


def test_credentials_are_written_as_json_and_read_back():
    assert Credentials.from_dict(json.loads(json.dumps(CREDENTIALS.to_dict()))) == CREDENTIALS


def test_neither_token_nor_key_is_shown():
    assert "ttt" not in repr(CREDENTIALS)
    assert str(CREDENTIALS.to_dict()["token"]) not in repr(CREDENTIALS)
    assert "PRIVATE" not in repr(IDENTITY)
    assert b"PRIVATE" in IDENTITY.key


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("address", "no port"), ("address", ":1"), ("address", "host:0"), ("address", "host:65536"),
        ("address", "h" * 400 + ":1"), ("certificate", b"no PEM"), ("run", ""),
        ("certificate", b"-----BEGIN CERTIFICATE-----" + bytes(20000)), ("client", "x" * 1025),
        ("round", -1), ("attempt", 2**32), ("token", b"short"), ("patience", 0.0),
        ("patience", float("nan")), ("patience", 1e12),
        ("limits", FrameLimits(0, 16, codec("bf16"))),
    ],
)  # fmt: skip
def test_credentials_out_of_range_are_refused_with_the_field(field, value):
    with pytest.raises(FrameError, match=f"credentials, {field}: expected"):
        replace(CREDENTIALS, **{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("token", "no base64!"), ("certificate", 3), ("run", 3), ("round", "2"), ("round", True),
        ("tokens", -1), ("patience", "30"), ("address", None), ("width", 2**40), ("wire", 1),
    ],
)  # fmt: skip
def test_written_credentials_of_wrong_types_are_refused_with_the_field(field, value):
    with pytest.raises(FrameError, match=f"credentials, {field}: expected") as caught:
        Credentials.from_dict({**CREDENTIALS.to_dict(), field: value})
    assert "no base64!" not in str(caught.value)


def test_written_credentials_have_all_fields_and_no_others():
    fields = CREDENTIALS.to_dict()
    for wrong in ({**fields, "more": 1}, {"run": "run"}, [fields]):
        with pytest.raises(FrameError, match="credentials: expected the fields"):
            Credentials.from_dict(wrong)
    with pytest.raises(FrameError, match="wire: expected one of"):
        Credentials.from_dict({**fields, "wire": "float8"})


def test_a_certificate_names_its_hosts_and_can_sign_no_other():
    read = x509.load_pem_x509_certificate(
        new_identity(["host.example", "10.0.0.1", "::1"]).certificate
    )
    names = read.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["host.example"]
    assert [str(one) for one in names.get_values_for_type(x509.IPAddress)] == ["10.0.0.1", "::1"]
    assert not read.extensions.get_extension_for_class(x509.BasicConstraints).value.ca


def test_a_certificate_is_valid_for_so_many_days():
    read = x509.load_pem_x509_certificate(new_identity(["h"], days=2.0).certificate)
    assert (read.not_valid_after_utc - read.not_valid_before_utc).days == 3  # one for the clocks


@pytest.mark.parametrize(("hosts", "days"), [([], 1), ([""], 1), (["ü.de"], 1), (["h"], 0)])
def test_a_certificate_that_cannot_be_is_refused(hosts, days):
    with pytest.raises(FrameError, match="certificate: expected"):
        new_identity(hosts, days=days)


def test_every_run_has_a_key_of_its_own():
    assert isinstance(IDENTITY, Identity)
    assert new_identity(["h"]).key != new_identity(["h"]).key


@pytest.mark.skipif(
    importlib.util.find_spec("grpc_tools") is None, reason="needs grpcio-tools, of the dev extra"
)
def test_the_generated_code_is_that_of_the_proto(tmp_path):
    """If it is not: run this command in the package's folder, with --python_out=. --pyi_out=."""
    folder = Path(package.__file__).parent
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{folder}"]
    command += [f"--python_out={tmp_path}", f"--pyi_out={tmp_path}", "split.proto"]
    subprocess.run(command, check=True)
    for name in ("split_pb2.py", "split_pb2.pyi"):
        assert (tmp_path / name).read_text() == (folder / name).read_text(), name
