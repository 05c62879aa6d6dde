"""What names a repository: a path, or a place in a store. Its text never shows credentials."""

from __future__ import annotations

from pathlib import Path

import pytest
from inferpool.errors import ConfigError
from inferpool.repository.stores.reference import StoreReference, parse_repository


def parsed(text: str) -> StoreReference:
    reference = parse_repository(text)
    assert isinstance(reference, StoreReference)
    return reference


@pytest.mark.parametrize("text", ["models", "/a/models", "./a b", "s3:/x", "C:\\x"])
def test_everything_else_is_a_path(text: str) -> None:
    assert parse_repository(text) == Path(text)


def test_a_file_address_is_a_path() -> None:
    assert parse_repository("file:///a/my%20models") == Path("/a/my models")


@pytest.mark.parametrize(
    ("text", "shown", "name"),
    [
        ("s3://bucket/a/models/", "s3://bucket/a/models", "models"),
        ("s3://bucket", "s3://bucket", "bucket"),
        ("S3://bucket/digits/3", "s3://bucket/digits/3", "digits"),
        ("gs://bucket/digits.onnx", "gs://bucket/digits.onnx", "digits"),
        ("az://container/spam", "az://container/spam", "spam"),
        ("s3://bucket/spam/model.onnx", "s3://bucket/spam/model.onnx", "spam"),
        ("https://h/spam/2/model.pt", "https://h/spam/2/model.pt", "spam"),
        ("https://u:secret@h:444/a/m.tar.gz?sig=secret", "https://h:444/a/m.tar.gz", "m"),
        ("https://h/digits.onnx", "https://h/digits.onnx", "digits"),
        ("hf://owner/all-MiniLM@refs%2Fpr%2F1", "hf://owner/all-MiniLM@refs/pr/1", "all-MiniLM"),
        ("hf://owner/name/onnx/model.onnx", "hf://owner/name/onnx/model.onnx", "name"),
        ("oci://r:5000/a/digits", "oci://r:5000/a/digits:latest", "digits"),
        ("oci://ghcr.io/a/digits:v1", "oci://ghcr.io/a/digits:v1", "digits"),
        (f"oci://r/d@sha256:{'a' * 64}", f"oci://r/d@sha256:{'a' * 64}", "d"),
        ("s3://bucket/_odd name".replace(" ", "%20"), "s3://bucket/_odd%20name", "model"),
    ],
)
def test_a_reference_has_a_name_and_a_text_without_secrets(text: str, shown: str, name: str) -> None:
    reference = parsed(text)
    assert (str(reference), reference.model_name) == (shown, name)
    assert "secret" not in f"{reference} {reference!r} {reference.key}"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("ftp://h/models", "ftp:// is no store; write s3://"),
        ("s3://", "needs a bucket"),
        ("s3://user@bucket/x", "needs a bucket"),
        ("https://h", "must name an archive"),
        ("https://h/x.tar#sha256=12", "must name an archive"),
        ("https://h:port/x.tar", "malformed"),
        ("http://other/x.tar", "use https://, or pin the file: http://other/x.tar#sha256="),
        ("hf://name", "hf://owner/name@revision"),
        ("oci://r/Name:tag", "oci://registry/name:tag"),
        ("s3://bucket/a\nb", "control character"),
        ("s3://bucket/" + "a" * 3000, "too long"),
    ],
)
def test_a_reference_that_cannot_be_read_is_refused(text: str, says: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_repository(text)
    assert says in refused.value.detail


def test_plain_http_is_taken_from_this_machine_and_with_a_digest() -> None:
    assert parsed("http://127.0.0.1:8/m.tar").is_local
    assert parsed("http://localhost/m.tar").is_local
    assert parsed(f"http://other/m.tar#sha256={'0' * 64}").sha256 == "0" * 64
    assert not parsed("oci://127.0.0.1.example.com/a").is_local
