"""Which prefixes cover which sources, and which version of a source is taken."""

from __future__ import annotations

from pathlib import Path

import pytest
from inferpool.errors import Forbidden, InvalidInput, StoreError
from inferpool.repository.stores.allowed_sources import AllowedSources, parse_source
from inferpool.repository.stores.content_cache import Blob
from inferpool.repository.stores.version_fetch import choose_version

PREFIXES = (
    "s3://bucket/models",
    "https://Models.example.com:8443/new/",
    "hf://owner",
    "oci://registry/team/",
)
PINNED = "#sha256=" + "0" * 64


@pytest.mark.parametrize(
    "source",
    [
        "s3://bucket/models", "s3://bucket/models/digits/3", "https://models.example.com:8443/new/a.tar.gz",
        "https://MODELS.example.com:8443/new/a.onnx?signature=x", "hf://owner/name@main",
        "oci://registry/team/digits:3",
    ],
)  # fmt: skip
def test_a_source_below_a_prefix_is_allowed(source: str) -> None:
    assert AllowedSources(PREFIXES).allowed(parse_source(source))


@pytest.mark.parametrize(
    "source",
    [
        "s3://bucket/models-of-others/digits", "s3://bucket2/models/digits", "s3://bucket/other",
        "s3://bucket/models/../other", "s3://bucket/%6dodels/digits", "gs://bucket/models/digits", "https://models.example.com/new/a.onnx",
        "http://models.example.com:8443/new/a.onnx" + PINNED, "https://models.example.com:8443/newer/a.onnx",
        "https://models.example.com:8443/new/../a.onnx", "https://models.example.com:8443/new/%2e%2e/a.onnx",
        "https://models.example.com:8443/new/%252e%252e/a.onnx",
        "https://models.example.com:8443/new/..%2fa.onnx", "https://models.example.com:8443/new\\..\\a.onnx",
        "https://models.example.com:8443/new//a.onnx", "https://models.example.com:8443.evil.org/new/a.onnx",
        "https://169.254.169.254/new/a.onnx", "hf://owner2/name", "oci://registry/teams/digits:3",
        "/etc/passwd",
    ],
)  # fmt: skip
def test_a_source_elsewhere_is_not(source: str) -> None:
    with pytest.raises((Forbidden, InvalidInput)):
        AllowedSources(PREFIXES).allowed(parse_source(source))
    assert not AllowedSources(()).covers_address("https://models.example.com:8443/new/a.onnx")


def test_a_redirect_stays_below_a_prefix() -> None:
    covers = AllowedSources(PREFIXES).covers_address
    assert covers("https://models.example.com:8443/new/b.onnx?x=1")
    for address in (
        "https://models.example.com:8443/b.onnx", "http://models.example.com:8443/new/b.onnx",
        "https://models.example.com:8443@evil.org/new/b.onnx", "https://evil.org/new/b.onnx",
        "https://models.example.com:x/new/b.onnx",
    ):  # fmt: skip
        assert not covers(address), address


def test_a_folder_is_compared_without_its_links(tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "new")
    allowed = AllowedSources((str(tmp_path / "link"),))
    assert allowed.allowed(parse_source(str(tmp_path / "new" / "digits"))).path == f"{tmp_path}/new/digits"
    (tmp_path / "new" / "out").symlink_to("/")
    (tmp_path / "new" / "hint").symlink_to("/elsewhere/secret")
    for name in ("out/etc", "hint"):
        with pytest.raises(Forbidden) as raised:
            allowed.allowed(parse_source(str(tmp_path / "new" / name)))
        # Nobody learns from the error where a link leads.
        assert f"{tmp_path}/new/{name} " in raised.value.detail


def chosen(
    source: str, depth: int, paths: list[str], model: str, version: int | None
) -> tuple[int, set[str]]:
    files = {path: Blob("", "0" * 64, 1) for path in paths}
    number, taken = choose_version(depth, files, model, version, parse_source(source))
    return number, set(taken)


@pytest.mark.parametrize(
    ("source", "depth", "paths", "version", "number", "taken"),
    [
        # One version of a repository with several, the newest one without a number.
        ("s3://b/models", 1, ["m/1/model.onnx", "m/2/model.onnx", "o/1/model.onnx"], 1, 1, {"1/model.onnx"}),
        ("s3://b/models", 1, ["m/1/model.onnx", "m/10/model.onnx", "m/9/model.onnx"], None, 10,
         {"10/model.onnx"}),
        # The only model has another name there.
        ("s3://b/models", 1, ["other/3/model.onnx", "other/model.toml"], None, 3,
         {"3/model.onnx", "model.toml"}),
        # The only version gets another number, that of the request or the one its path ends in.
        ("s3://b/m", 0, ["1/model.onnx", "labels.txt"], 7, 7, {"7/model.onnx", "labels.txt"}),
        ("s3://b/m/4", 0, ["1/model.onnx"], None, 4, {"4/model.onnx"}),
        # A file, with the files of weights that it names.
        ("https://h/m.onnx", 1, ["m.onnx", "m.onnx.data", "n.onnx"], 2, 2,
         {"2/model.onnx", "2/m.onnx.data"}),
    ],
)  # fmt: skip
def test_a_version_is_chosen(
    source: str, depth: int, paths: list[str], version: int | None, number: int, taken: set[str]
) -> None:
    assert chosen(source, depth, paths, "m", version) == (number, taken)


@pytest.mark.parametrize(
    ("paths", "version", "says"),
    [
        (["m/1/model.onnx", "m/2/model.onnx"], 3, "has no version 3; it has 1, 2"),
        (["a/1/model.onnx", "b/1/model.onnx"], None, "has no model m; it has a, b"),
        (["m/model.toml"], None, "has no version of m"),
        ([f"m/{10**20}/model.onnx"], None, "has version 100000000000000000000; the largest"),
    ],
)
def test_what_the_source_lacks_is_said(paths: list[str], version: int | None, says: str) -> None:
    with pytest.raises(StoreError, match=says):
        chosen("s3://b/models", 1, paths, "m", version)
