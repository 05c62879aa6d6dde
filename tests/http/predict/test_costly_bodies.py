"""Decoded bodies are counted before they take memory, or the time of other requests."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.conftest import ROOT
from tests.http.predict.costly_bodies import (
    DIGITS,
    FILE_CASES,
    JSON_CASES,
    Costly,
    costly_file,
    costly_json,
    webp,
    write_models,
)
from tests.server import Server

IN_FLIGHT_BYTES = 400 * 2**20
PEAK_BYTES = 700 * 2**20
"""The process may grow by the budget, and by the memory that it keeps of earlier bodies. Uncounted, each of
these files takes from 1.3 to 6.3 GB, or 25 s."""
JSON_PEAK_BYTES = 350 * 2**20
"""The same for JSON, which is refused before that. Uncounted, it takes 650 MB or more."""
LIVE_S = 5.0
"""A health check may take so long on a machine that runs other tests; uncounted it took up to 55 s."""
ANSWERED_S = 60.0
OTHER_CLIENT = "127.0.0.2"


@pytest.fixture(scope="module")
def server(models: Path, cache_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    repository = tmp_path_factory.mktemp("costly") / "models"
    write_models(repository)
    (repository / "digits").symlink_to(models / "digits", target_is_directory=True)
    flags = ("--in-flight-bytes", str(IN_FLIGHT_BYTES))
    started = Server(
        repository, flags, {"INFERPOOL_CACHE_DIR": str(cache_dir), "INFERPOOL_MEASURE_MS": "200"}
    )
    started.wait_loaded()
    yield started
    started.kill()


@contextmanager
def watched(server: Server) -> Iterator[list[float]]:
    """Give the seconds that health checks take meanwhile."""
    taken: list[float] = []
    done = threading.Event()

    def check() -> None:
        with httpx.Client(verify=False, timeout=ANSWERED_S) as client:
            while not done.wait(0.02):
                began = time.monotonic()
                assert client.get(server.url + "/health/live").status_code == 200
                taken.append(time.monotonic() - began)

    with ThreadPoolExecutor(1) as threads:
        checking = threads.submit(check)
        try:
            yield taken
        finally:
            done.set()
            checking.result()


def send(server: Server, costly: Costly) -> httpx.Response:
    return httpx.post(
        server.url + costly.path,
        content=costly.body,
        headers=costly.headers,
        timeout=ANSWERED_S,
        verify=False,
    )


def check_cost(server: Server, costly: Costly, peak_bytes: int) -> None:
    assert len(costly.body) < 700_000
    for pid in server.processes():
        Path(f"/proc/{pid}/clear_refs").write_text("5")  # the peak begins anew
    before = server.status_bytes("VmRSS")
    with watched(server) as taken, ThreadPoolExecutor(costly.times) as threads:
        answers = list(threads.map(lambda _: send(server, costly), range(costly.times)))
    for answer in answers:
        assert answer.status_code in costly.statuses, answer.text
        assert len(answer.content) < 100_000
    assert server.status_bytes("VmHWM") - before < peak_bytes
    assert max(taken) < LIVE_S
    budget = server.metric("in_flight_bytes")
    assert budget == 0, "everything that was reserved is given back"


@pytest.mark.parametrize("name", JSON_CASES)
def test_json_of_many_values_is_refused_before_objects_are_made(server: Server, name: str) -> None:
    check_cost(server, costly_json(name), JSON_PEAK_BYTES)


@pytest.mark.parametrize("name", FILE_CASES)
def test_what_files_become_is_reserved_before_it_is_allocated(server: Server, name: str) -> None:
    check_cost(server, costly_file(name), PEAK_BYTES)


def test_a_refusal_says_what_came_and_what_is_taken(server: Server) -> None:
    lists = send(server, costly_json("objects")).json()
    assert lists["code"] == "invalid_input"
    assert re.search(
        r"the body has \d+ JSON objects; the inputs of this model take at most 65536", lists["detail"]
    )
    strings = send(server, costly_json("strings")).json()
    assert (strings["code"], strings["limit"]) == ("body_too_large", 16 * 2**20)


def test_one_client_does_not_fill_the_threads_that_others_need(server: Server) -> None:
    """Two clients send pictures; the one who sends many waits, the other does not."""
    picture = webp(1500)
    small = (ROOT / "models/digits/samples/7.png").read_bytes()
    headers = {"content-type": "image/webp"}
    many = 30
    finished: list[float] = []

    def decode_much(_: int) -> None:
        answer = httpx.post(server.url + DIGITS, content=picture, headers=headers, timeout=280, verify=False)
        assert answer.status_code == 200, answer.text
        finished.append(time.monotonic())

    other = httpx.HTTPTransport(local_address=OTHER_CLIENT, verify=False)
    with ThreadPoolExecutor(many) as threads, httpx.Client(transport=other, timeout=ANSWERED_S) as client:
        began = [threads.submit(decode_much, number) for number in range(many)]
        while len(finished) < 2:
            time.sleep(0.01)
        form = client.post(server.url + DIGITS, files={"image": ("seven.png", small, "image/png")})
        answered = time.monotonic()
        assert form.status_code == 200, form.text
        for job in began:
            job.result()
    waiting = sum(moment > answered for moment in finished)
    assert waiting > many / 2, f"the other client was answered when {many - waiting} of {many} were done"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (DIGITS, '{"inputs": [], "id": "%s"}'),
        ("/v2/models/digits/infer", '{"inputs": [], "id": "%s"}'),
        ("/v2/models/digits/infer", '{"inputs": [], "outputs": [{"name": "%s"}, {"name": "%s"}]}'),
        (
            "/v2/models/digits/infer",
            '{"inputs": [{"name": "%s", "parameters": {"shared_memory_region": "r"}}]}',
        ),
        ("/v2/models/digits/infer", '{"inputs": [{"name": "%s", "datatype": "%s"}]}'),
        (DIGITS, '{"inputs": {"%s": []}}'),
        (DIGITS, '{"inputs": [], "outputs": ["%s"]}'),
        (DIGITS, '{"inputs": [], "%s": 1}'),
        (DIGITS, '{"inputs": [], "parameters": {"%s": 1}}'),
        (DIGITS, '{"inputs": [], "version": "%s"}'),
        ("/predict", '{"inputs": [], "model": "%s"}'),
        ("/predict", '{"inputs": [], "model": "digits", "version": "%s"}'),
    ],
)
def test_names_that_come_back_are_bounded(server: Server, path: str, body: str) -> None:
    name = "n" * 300_000
    answer = server.post(path, content=body.replace("%s", name), headers={"content-type": "application/json"})
    assert 400 <= answer.status_code < 500
    assert len(answer.content) < 4096, answer.text[:200]


def test_an_id_of_usual_length_comes_back(server: Server) -> None:
    rows = [[[[0] * 8] * 8]]
    for length, status in ((1024, 200), (1025, 422)):
        body = {"inputs": rows, "id": "é" * length}
        answer = server.post(DIGITS, json=body)
        assert answer.status_code == status
        assert status != 200 or answer.json()["id"] == body["id"]
