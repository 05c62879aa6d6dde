"""The page at `/`: one file, which loads nothing else and which a browser need not load twice."""

from __future__ import annotations

import base64
import gzip
import hashlib
import re

import pytest
from inferpool.http.conditional import is_known
from inferpool.http.page.routes import make_page

from tests.server import Server


def sources(policy: str) -> dict[str, str]:
    """The sources of a content security policy by directive."""
    return {name: values for name, _, values in (part.partition(" ") for part in policy.split("; "))}


def test_the_page_is_one_file_without_other_hosts(bundled: Server) -> None:
    answer = bundled.get("/")
    assert (answer.status_code, answer.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert answer.content == make_page()[0]
    # The names of XML namespaces are no addresses.
    addresses = set(re.findall(r"\w+://[\w./]+", answer.text))
    assert addresses == {"http://www.w3.org/2000/svg"}
    assert re.findall(r"<script[^>]*>|<style[^>]*>|<link[^>]*", answer.text)[0].count("data:") == 1
    assert not re.search(r"\ssrc=", answer.text)
    assert bundled.request("HEAD", "/").headers["content-length"] == str(len(gzip.compress(answer.content)))
    assert bundled.post("/").status_code == 405


def test_the_policy_allows_the_script_and_the_style_of_the_page_alone(bundled: Server) -> None:
    answer = bundled.get("/")
    allowed = sources(answer.headers["content-security-policy"])
    for element, directive in (("script", "script-src"), ("style", "style-src")):
        [content] = re.findall(rf"<{element}[^>]*>(.*?)</{element}>", answer.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert allowed[directive] == f"'sha256-{digest}'"
    assert allowed["default-src"] == allowed["frame-ancestors"] == allowed["base-uri"] == "'none'"
    assert allowed["connect-src"] == "'self'"
    assert allowed["require-trusted-types-for"] == "'script'"
    assert "unsafe" not in answer.headers["content-security-policy"]
    assert not re.search(r"<[^>]+\son\w+=", answer.text), "no handler stands in the HTML"
    assert not re.search(r"innerHTML|insertAdjacent|document\.write|Storage|document\.cookie", answer.text)


@pytest.mark.parametrize("path", ["/", "/status"])
def test_what_a_client_has_is_not_sent_again(bundled: Server, path: str) -> None:
    bundled.wait_loaded()
    whole = bundled.get(path, headers={"accept-encoding": "identity"})
    packed = bundled.get(path)
    assert packed.headers["content-encoding"] == "gzip"
    assert packed.headers["vary"] == "accept-encoding"
    assert int(packed.headers["content-length"]) < len(whole.content) / 2
    assert packed.content == whole.content
    tag = whole.headers["etag"]
    known = bundled.get(path, headers={"if-none-match": f'"other", {tag}'})
    assert (known.status_code, known.content, known.headers["etag"]) == (304, b"", tag)
    assert bundled.get(path, headers={"if-none-match": '"other"'}).status_code == 200


def test_tags_are_compared_as_weak_ones() -> None:
    assert is_known('"a", W/"b"', 'W/"a"')
    assert is_known("*", 'W/"a"')
    assert not is_known("", 'W/"a"')
    assert not is_known('"aa", a', 'W/"a"')
