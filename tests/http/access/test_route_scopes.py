"""Every route of every API denies by default; the cases come from the table of routes."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from inferpool.http.access.caller import ADMIN, METRICS, PREDICT, PUBLIC, READ
from inferpool.http.access.route_scopes import ROUTE_SCOPES, RouteScopes
from inferpool.http.openai.api import EMBEDDINGS, RERANK, SCORE

from tests.conftest import MakeChaos, Serve
from tests.http.access.keys import KeyFile, with_every_scope
from tests.server import Server

NAMES = {PREDICT: "predict", READ: "read", METRICS: "metrics", ADMIN: "admin"}
BODY = {"inputs": {"x": [[1.0] * 4]}}
VALUES = {"model": "m", "version": "1", "label": "stable", "job": "1"}


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> KeyFile:
    return with_every_scope(tmp_path_factory.mktemp("keys") / "keys.toml")


@pytest.fixture(scope="module")
def guarded(module_serve: Serve, module_make_chaos: MakeChaos, keys: KeyFile) -> Server:
    module_make_chaos("other")
    return module_serve(module_make_chaos("m"), "--keys-file", str(keys.path))


@pytest.fixture(scope="module")
def client(guarded: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=guarded.url, timeout=30) as client:
        yield client


def ask(client: httpx.Client, route: str, headers: dict[str, str]) -> httpx.Response:
    """Send the request that a line of the table is about."""
    method, template = route.split(" ")
    path = re.sub(r"\{(\w+)\}", lambda name: VALUES.get(name[1], "x"), template)
    if path == "/docs/files":
        path += "/swagger-ui.css"
    body = BODY if method in ("POST", "PUT") else None
    return client.request(method, path, json=body, headers=headers)


def refusal(answer: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """Check that an answer refuses in the form of its API; returns its body."""
    assert answer.status_code == status, answer.text
    body: dict[str, Any] = answer.json()
    path = answer.request.url.path
    plain = path.startswith(("/v2", "/v1/models")) or path in (*EMBEDDINGS, *RERANK, *SCORE)
    assert answer.headers["content-type"] == ("application/json" if plain else "application/problem+json")
    if isinstance(body.get("error"), dict):  # OpenAI's form
        assert body["error"]["code"] == code
        assert body["error"]["message"]
    else:
        assert body["code"] == code
        assert body["error" if plain else "detail"]
    assert answer.headers["x-request-id"]
    if status == 401:
        assert answer.headers["www-authenticate"].startswith('Bearer realm="inferpool"')
    return body


@pytest.mark.parametrize("route", ROUTE_SCOPES)
def test_every_route_refuses_no_key_wrong_keys_expired_keys_and_keys_with_other_scopes(
    client: httpx.Client, keys: KeyFile, route: str
) -> None:
    needed = ROUTE_SCOPES[route]
    if needed == PUBLIC:
        for headers in ({}, {"authorization": "Bearer wrong"}, keys.bearer("expired")):
            assert ask(client, route, headers).status_code == 200
        return
    refusal(ask(client, route, {}), 401, "unauthorized")
    for wrong in ("wrong", keys.keys["all"][:-1], keys.keys["all"] + "A", "a.b.c"):
        refusal(ask(client, route, {"authorization": f"Bearer {wrong}"}), 401, "unauthorized")
        refusal(ask(client, route, {"x-api-key": wrong}), 401, "unauthorized")
    for empty in ({"x-api-key": ""}, {"authorization": ""}, {"authorization": "Bearer"}):
        refusal(ask(client, route, empty), 401, "unauthorized")
    refusal(ask(client, route, keys.bearer("expired")), 401, "unauthorized")
    refusal(ask(client, route, {"authorization": f"Basic {keys.keys['all']}"}), 401, "unauthorized")
    for scope, name in NAMES.items():
        answer = ask(client, route, keys.bearer(name))
        if scope == needed:
            assert answer.status_code not in (401, 403), answer.text
        else:
            refusal(answer, 403, "forbidden")
    assert ask(client, route, {"x-api-key": keys.keys["all"]}).status_code not in (401, 403)


@pytest.mark.parametrize("route", [route for route, scope in ROUTE_SCOPES.items() if scope != PUBLIC])
def test_no_other_method_of_a_path_is_open(client: httpx.Client, route: str) -> None:
    for method in ("GET", "HEAD", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "BREW"):
        answer = ask(client, f"{method} {route.split(' ')[1]}", {})
        assert answer.status_code in (400, 401), (method, answer.text)


ODD = [
    *("/predict/m/", "/predict//m", "//predict/m", "/predict/m?x=1", "/predict/%6d", "/%70redict/m"),
    *("/predict/m#x", "http://other/predict/m", "/predict/../models", "/models/", "/models//m", "//models"),
    *("/models/m/1/", "/models/m%2f1", "/MODELS", "/./models", "/models;x", "/metrics/", "/metrics?a"),
    *("/docs/", "/docs/files/", "/docs/files/../files/swagger-ui.css", "/openapi.json/", "/v2/models/"),
    *("/v2//models", "/v2/models/m/infer/", "/v2/models/m/versions/1/infer?x", "/health/../models"),
    *("/health/%2e%2e/models", "/health?/models", "/;", "/nothing", "/favicon.ico", "*"),
]


@pytest.mark.parametrize("target", ODD)
def test_an_odd_spelling_of_a_path_opens_nothing(guarded: Server, target: str) -> None:
    for method in ("GET", "POST", "HEAD"):
        opens_nothing(guarded, method, target)


def opens_nothing(guarded: Server, method: str, target: str) -> None:
    head = f"{method} {target} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
    with socket.create_connection(("127.0.0.1", guarded.port), timeout=30) as connection:
        connection.sendall(head.encode())
        answer = b"".join(iter(lambda: connection.recv(65_536), b""))
    status = int(answer.split(b" ")[1])
    assert status in (400, 401) or (status == 307 and b"\r\n\r\n" in answer) or "/health?" in target, answer
    assert b'"models"' not in answer
    assert b"inferpool_" not in answer


def test_the_document_says_which_routes_need_a_key(client: httpx.Client, keys: KeyFile) -> None:
    document = client.get("/openapi.json", headers=keys.bearer("read")).json()
    assert set(document["components"]["securitySchemes"]) == {"bearer", "api_key"}
    for path, item in document["paths"].items():
        for method, operation in item.items():
            template = re.sub(r"^/predict/(m|other)$", "/predict/{model}", path)
            template = re.sub(r"^/v2/models/(m|other)/infer$", "/v2/models/{model}/infer", template)
            needed = ROUTE_SCOPES[f"{method.upper()} {template}"]
            named = [set(entry) for entry in operation["security"]]
            assert named == ([] if needed == PUBLIC else [{"bearer"}, {"api_key"}]), (path, method)
            assert ("401" in operation["responses"]) == (needed != PUBLIC), (path, method)


def test_a_route_without_a_scope_stops_the_server() -> None:
    from fastapi import FastAPI

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_api_route("/models", lambda: None, methods=["GET"])
    RouteScopes(app.routes)
    app.add_api_route("/models", lambda: None, methods=["DELETE"])
    with pytest.raises(LookupError, match=r'the route "DELETE /models" has no scope'):
        RouteScopes(app.routes)


def test_a_mount_and_a_websocket_need_a_scope_too() -> None:
    from fastapi import FastAPI

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.mount("/files", FastAPI())
    with pytest.raises(LookupError, match="GET /files"):
        RouteScopes(app.routes)
    other = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    other.add_api_websocket_route("/stream", lambda: None)
    with pytest.raises(LookupError, match="no route of a kind"):
        RouteScopes(other.routes)


def test_a_public_scope_needs_no_key(serve: Serve, make_chaos: MakeChaos, tmp_path: Path) -> None:
    file = with_every_scope(tmp_path / "keys.toml")
    server = serve(make_chaos("m"), "--keys-file", str(file.path), "--public-scopes", "metrics,read")
    assert server.get("/metrics").status_code == 200
    assert server.get("/v2/models/m").status_code == 200
    assert server.post("/predict/m", json=BODY).status_code == 401
    assert server.get("/metrics", headers={"x-api-key": "wrong"}).status_code == 401, "a wrong key is told"
    assert server.get("/metrics", headers=file.bearer("predict")).status_code == 403


def test_without_keys_nothing_changes_and_the_admin_routes_are_off(
    serve: Serve, make_chaos: MakeChaos
) -> None:
    server = serve(make_chaos("m"))
    with httpx.Client(base_url=server.url, timeout=30) as client:
        for route, needed in ROUTE_SCOPES.items():
            status = ask(client, route, {"authorization": "Bearer anything"}).status_code
            assert (status == 403) == (needed == ADMIN), route
    assert "securitySchemes" not in server.get("/openapi.json").text
