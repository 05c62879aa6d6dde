"""Models are fetched once, go on after a cut, are verified, and replace what was there in one step."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from inferpool.errors import Forbidden, StoreError, StoreUnreachable
from inferpool.repository.stores import content_cache, downloader, fetch, web_client
from inferpool.repository.stores.fetch import Fetched
from inferpool.repository.stores.reference import StoreReference, parse_repository
from inferpool.repository.stores.version_fetch import MADE, WantedVersion, fetch_version

from tests.repository.stores.archives import files_below, tar_of
from tests.repository.stores.web_server import LAST_MODIFIED, WebServer, web_server

MODEL = os.urandom(100_000)
FILES = {"digits/1/model.onnx": MODEL, "digits/labels.txt": b"one\n"}


@pytest.fixture
def server() -> Iterator[WebServer]:
    with web_server() as made:
        yield made


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(downloader, "PAUSE_S", 0.0)
    monkeypatch.setattr(web_client, "PAUSE_S", 0.0)
    monkeypatch.setattr(downloader, "PART_BYTES", 30_000)
    for name in ("HF_TOKEN", "HF_TOKEN_PATH", "HF_HOME", "DOCKER_CONFIG", "NETRC"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.delenv("HF_TOKEN")


def fetched(reference: str, cache: Path) -> Fetched:
    parsed = parse_repository(reference)
    assert isinstance(parsed, StoreReference)
    return fetch.fetch(parsed, cache)


def archive_at(server: WebServer, files: dict[str, bytes] = FILES, query: str = "") -> str:
    server.files["/m.tar.gz"] = tar_of(files)
    return f"http://{server.address}/m.tar.gz{query}"


def test_a_second_fetch_and_a_second_cache_entry_send_nothing(server: WebServer, tmp_path: Path) -> None:
    reference = archive_at(server)
    first = fetched(reference, tmp_path)
    assert (first.changed, files_below(first.path), first.path.name) == (True, FILES, "m")
    assert server.sent == first.fetched_bytes == len(server.files["/m.tar.gz"])
    server.asked.clear()
    assert fetched(reference, tmp_path) == Fetched(first.path, False, 0)
    assert [asked.method for asked in server.asked] == ["HEAD"]
    # The same content by another reference: the cache goes by content.
    digest = hashlib.sha256(server.files["/m.tar.gz"]).hexdigest()
    pinned = fetched(f"{reference}#sha256={digest}", tmp_path)
    assert fetched(f"{reference}?x=1#sha256={digest}", tmp_path).fetched_bytes == 0
    assert (pinned.path / "digits/1/model.onnx").stat().st_nlink == 3


def test_of_several_that_poll_the_first_one_asks(server: WebServer, tmp_path: Path) -> None:
    parsed = parse_repository(archive_at(server))
    assert isinstance(parsed, StoreReference)
    began = time.time()
    fetch.fetch(parsed, tmp_path, not_since=began - 1)
    archive_at(server, {"digits/1/model.onnx": b"new"})
    asked = len(server.asked)
    assert not fetch.fetch(parsed, tmp_path, not_since=began - 1).changed
    assert len(server.asked) == asked
    assert fetch.fetch(parsed, tmp_path, not_since=time.time() + 1).changed


def test_servers_that_start_at_once_fetch_once(server: WebServer, tmp_path: Path) -> None:
    reference = archive_at(server)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(fetched, [reference] * 4, [tmp_path] * 4))
    assert sorted(result.changed for result in results) == [False, False, False, True]
    assert server.sent == len(server.files["/m.tar.gz"])


def test_a_download_goes_on_where_it_was_cut(server: WebServer, tmp_path: Path) -> None:
    server.cuts, server.cut_after = 6, 7000
    reference = archive_at(server)
    assert files_below(fetched(reference, tmp_path).path) == FILES
    assert server.cuts == 0
    assert server.sent == len(server.files["/m.tar.gz"])  # no byte came twice
    assert all("If-Match" in asked.headers for asked in server.asked if asked.method == "GET")


def test_a_fetch_goes_on_where_an_ended_process_was(
    server: WebServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = archive_at(server)
    monkeypatch.setattr(downloader, "TRIES", 1)
    monkeypatch.setattr(downloader, "WORKERS", 1)
    gets = []

    def cut_the_third() -> None:
        gets.append(1)
        server.cuts = int(len(gets) == 3)

    server.on_get = cut_the_third
    with pytest.raises(StoreUnreachable, match="given up after 1 tries"):
        fetched(reference, tmp_path)
    arrived = server.sent
    assert arrived > 30_000
    server.cuts, server.on_get = 0, lambda: None
    result = fetched(reference, tmp_path)
    assert files_below(result.path) == FILES
    assert result.fetched_bytes == len(server.files["/m.tar.gz"]) - arrived // 30_000 * 30_000


def test_a_server_without_parts_is_read_from_the_beginning_again(server: WebServer, tmp_path: Path) -> None:
    server.ranges, server.cuts, server.cut_after = False, 1, 50_000
    assert files_below(fetched(archive_at(server), tmp_path).path) == FILES


def test_a_file_that_changes_while_it_is_read_is_never_mixed(server: WebServer, tmp_path: Path) -> None:
    reference = archive_at(server)
    later = {"digits/1/model.onnx": os.urandom(100_000)}
    gets = []

    def change() -> None:
        gets.append(1)
        if len(gets) == 2:
            server.files["/m.tar.gz"] = tar_of(later)

    server.on_get = change
    assert files_below(fetched(reference, tmp_path).path) == later


def test_damaged_content_is_refused_and_fetched_again(server: WebServer, tmp_path: Path) -> None:
    reference = archive_at(server)
    whole = server.files["/m.tar.gz"]
    pinned = f"{reference}#sha256={hashlib.sha256(whole).hexdigest()}"
    server.files["/m.tar.gz"] = whole[:500] + bytes([whole[500] ^ 1]) + whole[501:]
    with pytest.raises(StoreError, match=r"m.tar.gz: it arrived damaged: the digest is .*, expected"):
        fetched(pinned, tmp_path)
    server.files["/m.tar.gz"] = whole
    assert files_below(fetched(pinned, tmp_path).path) == FILES


def test_only_what_has_changed_is_exchanged_and_notes_stay(server: WebServer, tmp_path: Path) -> None:
    files = {**FILES, "digits/2/model.onnx": b"two", "spam/1/model.onnx": b"spam"}
    folder = fetched(archive_at(server, files), tmp_path).path
    (folder / "digits" / ".labels.json").write_text("{}")
    unchanged = (folder / "digits/1").stat()
    later = {
        **FILES,
        "digits/labels.txt": b"uno\n",
        "digits/3/model.onnx": b"three",
        "new/1/model.onnx": b"n",
    }
    assert fetched(archive_at(server, later), tmp_path).changed
    assert files_below(folder) == {**later, "digits/.labels.json": b"{}"}
    status = (folder / "digits/1").stat()
    assert (status.st_ino, status.st_mtime_ns) == (unchanged.st_ino, unchanged.st_mtime_ns)
    # The other layout: the same folder is the folder of one model now.
    other = fetched(archive_at(server, {"1/model.onnx": MODEL}), tmp_path)
    assert (other.path, files_below(other.path)) == (folder, {"1/model.onnx": MODEL})


def test_an_exchange_works_without_the_system_call(
    server: WebServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from inferpool.repository.stores import working_folder

    folder = fetched(archive_at(server), tmp_path).path
    monkeypatch.setattr(working_folder, "_exchange", lambda one, other: False)
    later = {"digits/1/model.onnx": b"other"}
    fetched(archive_at(server, later), tmp_path)
    assert files_below(folder) == later


def test_a_store_that_does_not_answer_leaves_what_was_fetched(
    server: WebServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    reference = archive_at(server, query="?signature=hidden")
    folder = fetched(reference, tmp_path).path
    server.close()
    assert fetched(reference, tmp_path) == Fetched(folder, False, 0)
    assert "what was fetched at" in caplog.text
    assert "hidden" not in caplog.text
    with pytest.raises(StoreUnreachable) as refused:
        fetched(reference, tmp_path / "other")
    assert "hidden" not in refused.value.detail


def test_a_cache_that_can_only_be_read_is_served(
    server: WebServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    reference = archive_at(server)
    folder = fetched(reference, tmp_path).path
    # Root may write anywhere; the file system refuses it as a read-only layer of an image does.
    monkeypatch.setattr(content_cache.ContentCache, "prepare", lambda cache: False)
    assert fetched(reference, tmp_path) == Fetched(folder, False, 0)
    assert not caplog.records
    archive_at(server, {"digits/1/model.onnx": b"new"})
    assert fetched(reference, tmp_path) == Fetched(folder, False, 0)
    assert "has changed, and the cache can only be read" in caplog.text
    with pytest.raises(StoreError, match="is not in the cache, which can only be read"):
        fetched(f"http://{server.address}/other.tar.gz", tmp_path)


def test_contents_that_nobody_uses_are_deleted_after_a_day(
    server: WebServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched(archive_at(server), tmp_path)
    monkeypatch.setattr(content_cache, "UNUSED_S", -1.0)
    fetched(archive_at(server, {"digits/1/model.onnx": b"new"}), tmp_path)
    assert [file.read_bytes() for file in (tmp_path / "stores" / "blobs").iterdir()] == [b"new"]
    assert len(list((tmp_path / "stores" / "index").iterdir())) == 1


def test_a_password_goes_to_its_server_and_nowhere_else(server: WebServer, tmp_path: Path) -> None:
    server.required = f"Basic {base64.b64encode(b'me:hidden').decode()}"
    reference = archive_at(server).replace("//", "//me:hidden@")
    with web_server() as other:
        other.files["/real.tar.gz"] = tar_of(FILES)
        server.replies["/m.tar.gz"] = (302, {"Location": f"http://{other.address}/real.tar.gz"}, b"")
        folder = fetched(reference, tmp_path).path
        assert files_below(folder) == FILES
        assert other.asked
        assert not any("Authorization" in asked.headers for asked in other.asked)
    with pytest.raises(StoreError) as refused:
        fetched(reference.replace("hidden", "wrong-hidden"), tmp_path / "other")
    assert "HTTP status 401" in refused.value.detail
    assert "hidden" not in refused.value.detail
    assert b"hidden" not in b"".join(files_below(tmp_path).values())
    # What was fetched with the password is served without it, because an image has none.
    assert fetched(reference.replace("hidden", "wrong-hidden"), tmp_path) == Fetched(folder, False, 0)


def test_a_password_may_be_in_a_netrc_file(
    server: WebServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.required = f"Basic {base64.b64encode(b'me:hidden').decode()}"
    reference = archive_at(server)
    with pytest.raises(StoreError, match="the credentials are missing"):
        fetched(reference, tmp_path / "cache")
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password hidden\n")
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert files_below(fetched(reference, tmp_path / "cache").path) == FILES


def test_a_single_model_file_is_served_under_its_name(server: WebServer, tmp_path: Path) -> None:
    server.files["/a/digits.onnx"] = MODEL
    assert files_below(fetched(f"http://{server.address}/a/digits.onnx", tmp_path).path) == {
        "digits.onnx": MODEL
    }


def put_on_hub(server: WebServer, tokenizer: bytes, model: bytes = MODEL) -> str:
    """Let the server answer as the hub's interface does: a revision, pages of its files, and the files.

    Returns the path of the tokenizer.
    """
    commit = "c" * 40
    git = hashlib.sha1(b"blob %d\0" % len(tokenizer) + tokenizer, usedforsecurity=False).hexdigest()
    large = {"oid": hashlib.sha256(model).hexdigest(), "size": len(model)}
    tree = f"/api/models/me/small/tree/{commit}?recursive=true"
    file = {"type": "file", "oid": "0" * 40}
    first = [{"type": "directory", "path": "onnx", "oid": "1" * 40, "size": 0},
             {**file, "path": "onnx/model.onnx", "size": len(model), "lfs": large},
             {**file, "path": "onnx/model_fp16.onnx", "size": 9, "lfs": {**large, "size": 9}}]  # fmt: skip
    second = [{**file, "path": "tokenizer.json", "size": len(tokenizer), "oid": git},
              {**file, "path": "model.safetensors", "size": 10**12}]  # fmt: skip
    link = {"Link": f'<http://{server.address}{tree}&cursor=2>; rel="next"'}
    server.replies = {
        "/api/models/me/small/revision/main": (200, {}, json.dumps({"sha": commit}).encode()),
        tree: (200, link, json.dumps(first).encode()),
        f"{tree}&cursor=2": (200, {}, json.dumps(second).encode()),
    }
    server.files[f"/me/small/resolve/{commit}/onnx/model.onnx"] = model
    server.files[f"/me/small/resolve/{commit}/tokenizer.json"] = tokenizer
    return f"/me/small/resolve/{commit}/tokenizer.json"


def test_a_model_of_the_hub(server: WebServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", f"http://{server.address}")
    monkeypatch.setenv("HF_TOKEN", "hf_hidden")
    server.required = "Bearer hf_hidden"
    tokenizer = b'{"version": "1.0"}'
    path = put_on_hub(server, tokenizer)
    server.cuts, server.cut_after = 2, 5000
    result = fetched("hf://me/small", tmp_path)
    assert result.path.name == "small"
    assert files_below(result.path) == {"1/model.onnx": MODEL, "tokenizer.json": tokenizer}
    assert fetched("hf://me/small", tmp_path).fetched_bytes == 0
    chosen = fetched("hf://me/small/onnx/model.onnx", tmp_path)
    assert (chosen.fetched_bytes, files_below(chosen.path)) == (0, files_below(result.path))
    server.files[path] = tokenizer.replace(b"1", b"2")
    with pytest.raises(StoreError, match=r"tokenizer\.json: it arrived damaged"):
        fetched("hf://me/small", tmp_path / "other")


def test_a_listing_that_is_cut_or_refused_for_a_moment_is_asked_for_again(
    server: WebServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "inferpool")
    monkeypatch.setenv("HF_ENDPOINT", f"http://{server.address}")
    put_on_hub(server, b"{}")
    server.cuts, server.cut_after = 2, 30
    assert files_below(fetched("hf://me/small", tmp_path / "hub").path)["1/model.onnx"] == MODEL
    layers_of(server, (MODEL, titled("1/model.onnx")))
    server.busy = 3
    registry = fetched(f"oci://{server.address}/a/digits:v1", tmp_path / "registry")
    assert files_below(registry.path) == {"1/model.onnx": MODEL}
    server.busy = 3
    reference = archive_at(server, query="?signature=hidden")
    assert files_below(fetched(reference, tmp_path / "web").path) == FILES
    said = [record.message for record in caplog.records if record.message.endswith("asked again")]
    assert sum("HTTP status 503" in line for line in said) == 6
    assert "hidden" not in "".join(said)
    server.busy, server.asked = web_client.TRIES, []
    with pytest.raises(StoreUnreachable, match="HTTP status 503"):
        fetched(reference, tmp_path / "other")
    assert len(server.asked) == web_client.TRIES


def layers_of(server: WebServer, *layers: tuple[bytes, dict[str, object]]) -> None:
    """Put a manifest with these layers, as `(content, facts)`, under the tag `v1`, which wants a token."""
    entries = []
    for content, facts in layers:
        digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
        server.files[f"/v2/a/digits/blobs/{digest}"] = content
        entries.append({"digest": digest, "size": len(content), "mediaType": "application/x", **facts})
    manifest = json.dumps({"schemaVersion": 2, "layers": entries}).encode()
    digest = f"sha256:{hashlib.sha256(manifest).hexdigest()}"
    index = {"manifests": [{"digest": digest, "platform": {"os": "linux", "architecture": "other"}}]}
    server.replies = {
        "/v2/a/digits/manifests/v1": (200, {}, json.dumps(index).encode()),
        f"/v2/a/digits/manifests/{digest}": (200, {}, manifest),
    }


def titled(path: str) -> dict[str, object]:
    return {"annotations": {"org.opencontainers.image.title": path}}


def test_an_artifact_of_a_registry(server: WebServer, tmp_path: Path) -> None:
    layers_of(server, (MODEL, titled("digits/1/model.onnx")), (b"one\n", titled("digits/labels.txt")))
    reference = f"oci://{server.address}/a/digits:v1"
    assert files_below(fetched(reference, tmp_path).path) == FILES
    assert fetched(reference, tmp_path).fetched_bytes == 0


def test_the_models_of_an_image(server: WebServer, tmp_path: Path) -> None:
    tar: dict[str, object] = {"mediaType": "application/vnd.oci.image.layer.v1.tar+gzip"}
    below = tar_of(
        {"etc/passwd": b"x", "models/digits/1/model.onnx": b"old", "models/digits/2/model.onnx": b"2"}
    )
    above = tar_of({"models/digits/1/model.onnx": MODEL, "models/digits/2/.wh.model.onnx": b"", "lib/x": b""})
    layers_of(server, (below, tar), (above, tar))
    folder = fetched(f"oci://{server.address}/a/digits:v1", tmp_path).path
    assert files_below(folder) == {"digits/1/model.onnx": MODEL}


def test_a_registry_gives_a_token_for_a_password(
    server: WebServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    login = base64.b64encode(b"me:hidden").decode()
    (tmp_path / "config.json").write_text(json.dumps({"auths": {server.address: {"auth": login}}}))
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    layers_of(server, (MODEL, titled("1/model.onnx")))
    challenge = f'Bearer realm="http://{server.address}/token",service="r",scope="repository:a/digits:pull"'
    answer_real: Callable[..., None] = server.answer

    def answer(handler: object) -> None:
        path, given = handler.path, handler.headers.get("Authorization", "")  # type: ignore[attr-defined]
        if path.startswith("/token"):
            assert given == f"Basic {login}"
            assert "scope=repository%3Aa%2Fdigits%3Apull" in path
            server.send(handler, 200, {}, b'{"token": "short-lived"}')
        elif given != "Bearer short-lived":
            server.send(handler, 401, {"WWW-Authenticate": challenge}, b"")
        else:
            answer_real(handler)

    monkeypatch.setattr(server, "answer", answer)
    assert files_below(fetched(f"oci://{server.address}/a/digits:v1", tmp_path / "c").path) == {
        "1/model.onnx": MODEL
    }
    assert b"hidden" not in b"".join(files_below(tmp_path / "c").values())


def test_the_endpoint_of_azure_may_be_a_plain_server(
    server: WebServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", f"http://{server.address}/account")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "aGlkZGVu")
    tag = hashlib.md5(MODEL, usedforsecurity=False).hexdigest()
    listing = f"""<EnumerationResults><Blobs><Blob><Name>all/m/1/model.onnx</Name><Properties>
        <Last-Modified>{LAST_MODIFIED}</Last-Modified><Etag>"{tag}"</Etag>
        <Content-Length>{len(MODEL)}</Content-Length><Content-Type>x/y</Content-Type>
        </Properties></Blob></Blobs><NextMarker /></EnumerationResults>"""
    path = "/account/models?restype=container&comp=list&prefix=all%2F"
    server.replies[path] = (200, {}, listing.encode())
    server.files["/account/models/all/m/1/model.onnx"] = MODEL
    assert files_below(fetched("az://models/all", tmp_path).path) == {"m/1/model.onnx": MODEL}
    assert fetched("az://models/all", tmp_path).fetched_bytes == 0
    for status, code, said in (
        (403, "AuthorizationFailure", r"refuses \(AuthorizationFailure\): the credentials are missing"),
        (404, "ContainerNotFound", r"is not there \(ContainerNotFound\)"),
    ):
        server.replies[path] = (status, {}, f"<Error><Code>{code}</Code></Error>".encode())
        with pytest.raises(StoreError, match=said):
            fetched("az://models/all", tmp_path / "other")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "hidden!")
    with pytest.raises(StoreError, match="set AZURE_STORAGE_ACCOUNT_KEY to the text in Base64") as refused:
        fetched("az://models/all", tmp_path / "other")
    assert "hidden" not in refused.value.detail


def laid_out(source: str, prefix: str, model: str, tmp_path: Path) -> dict[str, bytes]:
    """The files of version 3 of a new model that is loaded from a source below `prefix`."""
    repository, staging = tmp_path / "models", tmp_path / "models" / ".inferpool-incoming-1"
    repository.mkdir(parents=True)
    wanted = WantedVersion(
        source, (prefix,), model, 3, str(repository), str(repository / model), str(tmp_path / "cache"),
        str(staging),
    )  # fmt: skip
    result = fetch_version(wanted, lambda fetched, expected: None)
    assert (result.version, result.target) == (3, str(repository / model))
    return files_below(staging / MADE)


def test_a_version_is_loaded_from_the_hub(
    server: WebServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", f"http://{server.address}")
    put_on_hub(server, b"{}")
    assert laid_out("hf://me/small", "hf://me", "texts", tmp_path) == {
        "3/model.onnx": MODEL, "tokenizer.json": b"{}"
    }  # fmt: skip
    with pytest.raises(Forbidden, match="hf://me/small is not below a prefix"):
        laid_out("hf://me/small", "hf://you", "texts", tmp_path / "other")


def test_a_version_is_loaded_from_a_registry(server: WebServer, tmp_path: Path) -> None:
    layers_of(server, (MODEL, titled("digits/3/model.onnx")), (b"old", titled("digits/1/model.onnx")))
    team = f"oci://{server.address}/a"
    assert laid_out(f"{team}/digits:v1", team, "digits", tmp_path) == {"3/model.onnx": MODEL}
