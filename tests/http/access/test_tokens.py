"""Tokens of an issuer, whose keys a real HTTP server hands out."""

from __future__ import annotations

import base64
import hashlib
import hmac
import http.server
import json
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st
from inferpool.errors import ConfigError, InferpoolError, NotReady, Unauthorized
from inferpool.http.access.caller import ADMIN, METRICS, PREDICT, READ, Caller
from inferpool.http.access.jwks import LEAST_PAUSE_S, JwksWatch, parse_key_set
from inferpool.http.access.tokens import MOST_TOKENS, TokenVerifier
from inferpool.observe.metrics import Metrics
from inferpool.observe.metrics_page import MetricsPage
from inferpool.settings_sources import read_settings

from tests.conftest import MakeChaos, Serve
from tests.http.access.keys import KeyFile
from tests.server import START_S, wait_until

ISSUER, AUDIENCE = "https://login.example.com/", "inferpool"
LIFE_S = 86_400
"""How long tokens are valid, which is longer than all tests take."""
BODY = {"inputs": {"x": [[1.0] * 4]}}
RSA_KEY = rsa.generate_private_key(public_exponent=65537, key_size=2048)
OTHER_RSA_KEY = rsa.generate_private_key(public_exponent=65537, key_size=2048)
EC_KEY = ec.generate_private_key(ec.SECP256R1())
ED_KEY = ed25519.Ed25519PrivateKey.generate()
ALGORITHMS = {"rsa": "RS256", "ec": "ES256", "ed": "EdDSA", "next": "RS256"}
PRIVATE: dict[str, Any] = {"rsa": RSA_KEY, "ec": EC_KEY, "ed": ED_KEY, "next": OTHER_RSA_KEY}


def public(name: str, **more: Any) -> dict[str, Any]:
    """The public key `name` as an entry of a set."""
    kinds: dict[str, Any] = {
        "rsa": jwt.algorithms.RSAAlgorithm,
        "ec": jwt.algorithms.ECAlgorithm,
        "ed": jwt.algorithms.OKPAlgorithm,
    }
    kind = kinds.get(name, jwt.algorithms.RSAAlgorithm)
    return {**kind.to_jwk(PRIVATE[name].public_key(), as_dict=True), "kid": name, **more}


def key_set(*names: str) -> bytes:
    return json.dumps({"keys": [public(name) for name in names]}).encode()


def token(name: str = "rsa", headers: dict[str, Any] | None = None, **claims: Any) -> str:
    """A token that is valid but for `claims`; None leaves a claim out."""
    now = int(time.time())
    usual = {
        "iss": ISSUER,
        "aud": AUDIENCE,
        "sub": "acme",
        "exp": now + LIFE_S,
        "scope": "openid predict:m read",
    }
    given = {claim: value for claim, value in {**usual, **claims}.items() if value is not None}
    return jwt.encode(given, PRIVATE[name], ALGORITHMS[name], headers={"kid": name, **(headers or {})})


class Issuer:
    """An HTTP server that hands out a set of keys."""

    def __init__(self) -> None:
        self.body = key_set("rsa")
        self.status = 200
        self.fetches = 0
        self.hold = threading.Event()
        self.hold.set()
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.fetches += 1
                outer.hold.wait(60)
                self.send_response(outer.status)
                if outer.status == 302:
                    self.send_header("location", outer.url + "/elsewhere")
                self.send_header("content-length", str(len(outer.body)))
                self.end_headers()
                self.wfile.write(outer.body)

            def log_message(self, *_: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/keys"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.hold.set()
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def issuer() -> Iterator[Issuer]:
    issuer = Issuer()
    yield issuer
    issuer.close()


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Verifier:
    """A verifier over a file of keys, with a clock of its own."""

    def __init__(self, folder: Path, data: bytes, **options: Any) -> None:
        (folder / "jwks.json").write_bytes(data)
        self.clock, self.changes = Clock(), 0
        self.watch = JwksWatch(str(folder / "jwks.json"), lambda: None, self.clock, Metrics({}))
        usual: dict[str, Any] = {
            "issuer": ISSUER, "audience": [AUDIENCE], "algorithms": ["RS256", "ES256", "EdDSA"],
            "scope_claim": "scope", "scope_map": {}, "tenant_claim": "sub",
        }  # fmt: skip
        self.verifier = TokenVerifier(
            self.watch, clock=self.clock, wall_clock=time.time, **{**usual, **options}
        )

    def identify(self, text: str | bytes) -> Caller:
        data = text if isinstance(text, bytes) else text.encode()
        return self.verifier.identify(data, hashlib.sha256(data).digest())

    def refusal(self, text: str | bytes) -> str:
        with pytest.raises(Unauthorized) as caught:
            self.identify(text)
        return caught.value.detail


@pytest.fixture(scope="module")
def verifier(tmp_path_factory: pytest.TempPathFactory) -> Verifier:
    return Verifier(tmp_path_factory.mktemp("jwks"), key_set("rsa", "ec", "ed"))


@pytest.mark.parametrize("name", ["rsa", "ec", "ed"])
def test_a_token_has_its_tenant_its_scopes_and_its_expiry(verifier: Verifier, name: str) -> None:
    caller = verifier.identify(token(name))
    assert (caller.tenant, caller.key_id, caller.models) == ("acme", "acme", frozenset("m"))
    assert [caller.allows(scope) for scope in (PREDICT, READ, METRICS, ADMIN)] == [True, True, False, False]
    assert LIFE_S - START_S < caller.valid_until - verifier.clock.now < LIFE_S + 31
    assert verifier.identify(token(name, aud=["another", AUDIENCE])).tenant == "acme"


def signed_by_hand(header: dict[str, Any], secret: bytes | None) -> str:
    """A token that no library makes: without a signature, or with one by a shared secret."""
    claims = {
        "iss": ISSUER,
        "aud": AUDIENCE,
        "sub": "acme",
        "exp": int(time.time()) + LIFE_S,
        "scope": "admin",
    }
    parts = [base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=") for part in (header, claims)]
    text = b".".join(parts)
    signature = b"" if secret is None else hmac.digest(secret, text, "sha256")
    return (text + b"." + base64.urlsafe_b64encode(signature).rstrip(b"=")).decode()


PEM = RSA_KEY.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (token(exp=int(time.time()) - 60), "expired"),
        (token(exp=None), "a claim is missing"),
        (token(exp=float("inf")), "cannot be read"),
        (token(aud="another"), "audience"),
        (token(aud=None), "a claim is missing"),
        (token(iss="https://evil.example.com/"), "issuer"),
        (token(iss=None), "a claim is missing"),
        (token(nbf=int(time.time()) + LIFE_S), "not valid yet"),
        (token(sub=None), '"sub" names no tenant'),
        (token(sub="a\nb"), '"sub" names no tenant'),
        (token(sub="x" * 200), '"sub" names no tenant'),
        (token("next", {"kid": "rsa"}), "signature is wrong"),
        (token("next"), "no key of the issuer"),
        (token("ec", {"kid": "rsa"}), "no key of the issuer"),
        (token(headers={"crit": ["x"], "x": 1}), "critical|cannot be read"),
        (signed_by_hand({"alg": "none", "kid": "rsa"}, None), "algorithm is not allowed"),
        (signed_by_hand({"alg": "None", "kid": "rsa"}, None), "algorithm is not allowed"),
        (signed_by_hand({"kid": "rsa"}, None), "cannot be read|algorithm is not allowed"),
        (signed_by_hand({"alg": "HS256", "kid": "rsa"}, PEM), "algorithm is not allowed"),
        (
            signed_by_hand({"alg": "HS256", "kid": "rsa"}, json.dumps(public("rsa")).encode()),
            "algorithm is not",
        ),
        (signed_by_hand({"alg": "RS256", "kid": "rsa"}, None), "signature is wrong"),
        (signed_by_hand({"alg": "RS256", "kid": "rsa"}, PEM), "signature is wrong"),
        (signed_by_hand({"alg": ["RS256"], "kid": "rsa"}, PEM), "algorithm is not allowed"),
        (jwt.encode({"sub": "a"}, RSA_KEY, "RS512", headers={"kid": "rsa"}), "algorithm is not allowed"),
        (token()[:-6], "signature is wrong|cannot be read"),
        ("..", "cannot be read"),
        ("a.b.c", "cannot be read"),
        ("." * 2 + "x" * 20_000, "too long"),
        (base64.urlsafe_b64encode(b"[" * 9000).decode() + ".e30.", "cannot be read"),
    ],
)
def test_a_wrong_token_is_refused(verifier: Verifier, text: str, said: str) -> None:
    assert re.search(said, verifier.refusal(text))


@given(st.binary(max_size=200), st.binary(max_size=60))
def test_any_bytes_are_refused(verifier: Verifier, header: bytes, rest: bytes) -> None:
    for data in (
        header,
        base64.urlsafe_b64encode(header) + b"." + base64.urlsafe_b64encode(rest) + b"." + rest,
    ):
        with pytest.raises(Unauthorized):
            verifier.identify(data)


@given(
    st.dictionaries(
        st.sampled_from(["alg", "kid", "typ", "crit", "b64", "jku", "jwk", "x5u"]),
        st.none()
        | st.integers()
        | st.text()
        | st.lists(st.text())
        | st.sampled_from(["RS256", "rsa", "none"]),
    )
)
def test_any_header_without_a_valid_signature_is_refused(verifier: Verifier, header: dict[str, Any]) -> None:
    verifier.refusal(signed_by_hand(header, PEM))


def test_scopes_come_from_any_claim_and_may_be_mapped(tmp_path: Path) -> None:
    nested = Verifier(tmp_path, key_set("rsa"), scope_claim="realm_access.roles", tenant_claim="org")
    caller = nested.identify(
        token(realm_access={"roles": ["read", "metrics", 7, "predict:", "uma"]}, org="o1")
    )
    assert (caller.tenant, caller.scopes & 15) == ("o1", READ | METRICS)
    mapped = Verifier(
        tmp_path, key_set("rsa"), scope_claim="https://example.com/roles",
        scope_map={"ml team": "predict", "ops": "admin"},
    )  # fmt: skip
    roles: dict[str, Any] = {"https://example.com/roles": ["ml team", "admin"]}
    caller = mapped.identify(token(**roles))
    assert caller.scopes & 15 == PREDICT, "only what is mapped counts"
    assert mapped.identify(token()).scopes & 15 == 0, "a token without the claim allows nothing"


def test_a_token_is_remembered_until_it_expires_or_keys_change(tmp_path: Path) -> None:
    verifier = Verifier(tmp_path, key_set("rsa"))
    text = token()
    caller = verifier.identify(text)
    assert verifier.identify(text) is caller
    verifier.clock.now = caller.valid_until
    assert "expired" in verifier.refusal(text)
    verifier.clock.now = 100.0
    (tmp_path / "jwks.json").write_bytes(key_set("ec"))
    verifier.watch.refresh()
    verifier.verifier.forget()  # the watch calls this on the event loop
    assert "no key of the issuer" in verifier.refusal(text)
    assert MOST_TOKENS <= 10_000


def test_a_set_has_only_keys_that_can_verify() -> None:
    weak = rsa.generate_private_key(public_exponent=65537, key_size=1024)
    listed = [
        public("rsa"), public("ec", use="enc"), public("ed", key_ops=["sign"]), public("next", alg="HS256"),
        {**jwt.algorithms.RSAAlgorithm.to_jwk(weak.public_key(), as_dict=True), "kid": "weak"},
        {"kty": "oct", "k": "c2VjcmV0", "kid": "shared"}, {"kty": "RSA", "kid": "broken"}, "no key", {},
    ]  # fmt: skip
    assert set(parse_key_set(json.dumps({"keys": listed}).encode())) == {"rsa"}
    for data in (
        b"",
        b"{}",
        b"[]",
        b'{"keys": {}}',
        b'{"keys": []}',
        b"\xff",
        json.dumps({"keys": listed[1:]}).encode(),
    ):
        with pytest.raises(ValueError):  # noqa: PT011 - any text
            parse_key_set(data)


def test_tokens_that_name_unknown_keys_cause_few_fetches(issuer: Issuer) -> None:
    clock = Clock()
    watch = JwksWatch(issuer.url, lambda: None, clock, Metrics({}))
    watch.refresh()
    assert issuer.fetches == 1

    class Loop:
        def call_soon_threadsafe(self, *_: object) -> None:
            pass

    watch.start(Loop())
    wait_until(lambda: issuer.fetches == 2, "the thread fetches at its start")
    for _ in range(1000):
        watch.refresh_soon()
    clock.now += LEAST_PAUSE_S
    watch.refresh_soon()
    wait_until(lambda: issuer.fetches == 3, "one fetch, once the pause is over")
    for _ in range(1000):
        watch.refresh_soon()
    watch.close()
    assert issuer.fetches == 3


def test_a_failing_issuer_keeps_the_former_keys(issuer: Issuer, caplog: pytest.LogCaptureFixture) -> None:
    metrics = Metrics({})
    watch = JwksWatch(issuer.url, lambda: None, time.monotonic, metrics)
    watch.refresh()
    known = watch.keys
    for status, body in ((500, b""), (200, b"no keys"), (200, b" " * (1 << 21)), (302, b"")):
        issuer.status, issuer.body = status, body
        watch.refresh()
        assert watch.keys is known
        assert b'inferpool_stale_keys{source="jwt_keys"} 1.0' in MetricsPage(metrics).render("")[0]
    assert len(caplog.records) == 1, "logged once until it works again"
    issuer.status, issuer.body = 200, key_set("ec")
    watch.refresh()
    assert set(watch.keys or {}) == {"ec"}
    assert b'inferpool_stale_keys{source="jwt_keys"} 0.0' in MetricsPage(metrics).render("")[0]


def test_the_address_of_keys_must_be_safe(tmp_path: Path) -> None:
    for source in (
        "http://login.example.com/keys",
        "https://user:pw@login.example.com/keys",
        str(tmp_path / "no"),
    ):
        with pytest.raises(ConfigError):
            JwksWatch(source, lambda: None, time.monotonic, Metrics({}))


def test_settings_of_tokens_belong_together() -> None:
    for flags in (
        {"jwt_keys": "https://x/keys"}, {"jwt_keys": "https://x/keys", "jwt_issuer": "i"},
        {"jwt_audience": "a"}, {"jwt_issuer": "i"}, {"jwt_scopes": "admin"},
        {"jwt_algorithms": "none"}, {"jwt_algorithms": "HS256"},
    ):  # fmt: skip
        with pytest.raises(ConfigError):
            read_settings(flags, {})
    read_settings({"jwt_keys": "k", "jwt_issuer": "i", "jwt_audience": "a,b", "jwt_scopes": "x=read"}, {})


def test_until_the_keys_are_known_a_token_is_answered_not_ready(issuer: Issuer) -> None:
    watch = JwksWatch(issuer.url, lambda: None, time.monotonic, Metrics({}))
    verifier = TokenVerifier(
        watch, issuer=ISSUER, audience=[AUDIENCE], algorithms=["RS256"], scope_claim="scope", scope_map={},
        tenant_claim="sub", clock=time.monotonic, wall_clock=time.time,
    )  # fmt: skip
    with pytest.raises(NotReady):
        verifier.identify(token().encode(), b"")
    with pytest.raises(InferpoolError):
        verifier.identify(b"..", b"")


@pytest.mark.parametrize("server_module", ["tests.servers.short_jwks"], indirect=True)
def test_a_server_takes_tokens_and_follows_the_rotation_of_keys(
    serve: Serve, make_chaos: MakeChaos, issuer: Issuer, tmp_path: Path
) -> None:
    file = KeyFile(tmp_path / "keys.toml")
    key = {"x-api-key": file.add("all", "predict", "metrics")}
    server = serve(
        make_chaos("m"), "--jwt-keys", issuer.url, "--jwt-issuer", ISSUER, "--jwt-audience", AUDIENCE,
        "--keys-file", str(file.path),
    )  # fmt: skip

    def status(text: str, path: str = "/predict/m") -> int:
        return server.post(path, json=BODY, headers={"authorization": f"Bearer {text}"}).status_code

    first, second = token("rsa"), token("next")
    wait_until(lambda: status(first) == 200, "the keys are fetched")
    assert server.post("/predict/m", json=BODY, headers=key).status_code == 200
    assert server.post("/predict/m", json=BODY).status_code == 401
    assert status(token(scope="predict:other")) == 403
    assert status(token(exp=1)) == 401
    assert server.get("/metrics", headers={"authorization": f"Bearer {first}"}).status_code == 403
    issuer.body = key_set("next")
    assert status(second) == 401, "no request waits for a fetch"
    wait_until(lambda: status(second) == 200, "the new key is fetched")
    wait_until(lambda: status(first) == 401, "the key that is gone is no longer accepted")
    # An issuer that does not answer delays nothing.
    issuer.hold.clear()
    assert status(token("ec")) == 401
    assert {status(second) for _ in range(20)} == {200}
    assert 'refused_keys_total{reason="token"}' in server.get("/metrics", headers=key).text
    assert first not in json.dumps(server.log)
