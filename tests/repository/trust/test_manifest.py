"""Manifests: their lines, and the names that may stand in them."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from inferpool.errors import LoadError
from inferpool.repository.trust.manifest import check_names, manifest_text, parse_manifest

ONE = "0" * 64
NAMES = st.from_regex(r"(\.\./)?[a-z][a-z ]*(/[a-zé]+){0,2}", fullmatch=True)


@given(st.dictionaries(NAMES, st.binary(min_size=32, max_size=32).map(bytes.hex)))
def test_a_manifest_is_read_as_it_was_written(digests: dict[str, str]) -> None:
    assert parse_manifest(manifest_text(digests).encode()) == digests


@given(st.binary(max_size=300))
def test_anything_else_is_a_reason_and_no_crash(content: bytes) -> None:
    with contextlib.suppress(LoadError):
        parse_manifest(content)


@pytest.mark.parametrize(
    "name",
    ["/etc/passwd", "../../x", "a/../../x", "..", "../..", "a/./b", "a//b", "../../M/1/model.onnx", "."],
)
def test_a_name_that_leads_elsewhere_is_refused(name: str) -> None:
    with pytest.raises(LoadError, match="leads out of the folder"):
        parse_manifest(f"{ONE}  {name}\n".encode())


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (f"{ONE} model.onnx\n", "line 1: expected 64"),
        (f"{ONE[1:]}  model.onnx\n", "line 1: expected 64"),
        (f"{ONE}  model.onnx\n\n", "line 2: expected 64"),
        (f"{ONE}  model.onnx\n{ONE}  model.onnx\n", "line 2: model.onnx is listed twice"),
    ],
)
def test_a_line_that_is_wrong_is_named(line: str, reason: str) -> None:
    with pytest.raises(LoadError, match=reason):
        parse_manifest(line.encode())


def test_a_name_that_sha256sum_would_write_otherwise_cannot_be_listed() -> None:
    with pytest.raises(LoadError, match="rename it"):
        manifest_text({"a\nb": ONE})


def test_a_file_that_nobody_signed_is_named() -> None:
    check_names({"model.onnx", "data"}, {"model.onnx"})
    with pytest.raises(LoadError, match=r"^extra\.bin was not signed"):
        check_names({"model.onnx"}, {"model.onnx", "extra.bin"})
    with pytest.raises(LoadError, match=r"^extra\.bin \(and 1 more\)"):
        check_names({"model.onnx"}, {"model.onnx", "extra.bin", "other.bin"})
