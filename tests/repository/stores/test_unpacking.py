"""Archives are unpacked with bounds; what could do harm is refused, and nothing of it is kept."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest
from inferpool.errors import StoreError
from inferpool.repository.stores import unpacking
from inferpool.repository.stores.content_cache import ContentCache
from inferpool.repository.stores.unpacking import unpack

from tests.repository.stores.archives import tar_of, tar_with, zip_of

FILES = {"./digits/1/model.onnx": b"model" * 1000, "digits/labels.txt": b"one\ntwo\n"}


@pytest.fixture
def cache(tmp_path: Path) -> ContentCache:
    made = ContentCache(tmp_path / "stores")
    assert made.prepare()
    return made


def unpacked(cache: ContentCache, content: bytes) -> dict[str, bytes]:
    archive = cache.partial / "archive"
    archive.write_bytes(content)
    return {blob.path: cache.path(blob.sha256).read_bytes() for blob in unpack(archive, cache)}


def refusal(cache: ContentCache, content: bytes) -> str:
    with pytest.raises(StoreError) as refused:
        unpacked(cache, content)
    left = {file.name for file in cache.partial.iterdir()}
    assert left == {"archive"}
    return refused.value.detail


@pytest.mark.parametrize("kind", ["w", "w:gz", "w:bz2", "w:xz", "zip"])
def test_every_kind_is_told_by_its_content(cache: ContentCache, kind: str) -> None:
    content = zip_of(FILES) if kind == "zip" else tar_of(FILES, kind)
    assert unpacked(cache, content) == {name.removeprefix("./"): data for name, data in FILES.items()}


@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "/etc/evil", "a//b", "a\nb"])
def test_a_name_that_leads_out_is_refused(cache: ContentCache, name: str) -> None:
    assert "evil" in refusal(cache, tar_of({name: b"x"})) or name in ("a//b", "a\nb")
    if not name.startswith("/"):
        refusal(cache, zip_of({name: b"x"}))


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE]
)
def test_links_devices_and_pipes_are_refused(cache: ContentCache, kind: bytes) -> None:
    member = tarfile.TarInfo("digits/1/model.onnx")
    member.type, member.linkname = kind, "labels.txt"
    assert "the archive is refused" in refusal(cache, tar_with(member))


def test_a_name_that_comes_twice_is_refused(cache: ContentCache) -> None:
    assert "twice" in refusal(cache, tar_of({"a": b"1", "./a": b"2"}))


def test_an_archive_that_grows_too_large_is_refused(
    cache: ContentCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unpacking, "ALWAYS_BYTES", 100_000)
    bomb = {"a/1/model.onnx": bytes(10_000_000)}
    assert "larger than" in refusal(cache, tar_of(bomb))
    assert "larger than" in refusal(cache, zip_of(bomb))
    assert len(unpacked(cache, tar_of(bomb, "w"))["a/1/model.onnx"]) == 10_000_000


def test_too_many_entries_are_refused(cache: ContentCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpacking, "MOST_FILES", 10)
    many = {f"a/{number}": b"" for number in range(20)}
    assert "more than 10 entries" in refusal(cache, tar_of(many))
    assert "more than 10 entries" in refusal(cache, zip_of(many))


def test_a_damaged_archive_is_refused(cache: ContentCache) -> None:
    whole = tar_of(FILES)
    assert "damaged" in refusal(cache, whole[: len(whole) // 2])
    assert "neither" in refusal(cache, b"<html>sign in first</html>")
    assert "zstd" in refusal(cache, b"\x28\xb5\x2f\xfd" + bytes(100))
