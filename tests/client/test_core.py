"""The policy of the client, without a server: each test plays the server and the clock."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from inferpool import errors
from inferpool.client.answer import Reply, ServerUnreachable, UnexpectedAnswer, read_error, read_prediction
from inferpool.client.backoff import Backoff
from inferpool.client.content import recognise
from inferpool.client.core import Attempt, Core, Failure, Options, Pause
from inferpool.http.problems import STATUSES

METADATA = {
    "name": "m",
    "versions": ["1"],
    "platform": "p",
    "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 2]}],
    "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1]}],
}
ROWS = np.ones((1, 2), np.float32)


def reply(status: int, document: object, **headers: str) -> Reply:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Reply(status, {"content-type": "application/json", **named}, json.dumps(document).encode())


def answer() -> Reply:
    header = json.dumps({
        "model_name": "m", "model_version": "3",
        "outputs": [{"name": "y", "datatype": "FP32", "shape": [1], "parameters": {"binary_data_size": 4}}],
    }).encode()  # fmt: skip
    return Reply(
        200,
        {"inference-header-content-length": str(len(header)), "x-request-id": "r"},
        header + np.float32(7).tobytes(),
    )


def test_an_output_that_the_model_lacks_is_named() -> None:
    with pytest.raises(UnexpectedAnswer, match='has no output "z"; it has "y"'):
        read_prediction(answer(), "m", ["y", "z"])
    assert read_prediction(answer(), "m", ["y"]).outputs.keys() == {"y"}


def refusal(status: int = 503, code: str = "overloaded", retry_after: str = "2") -> Reply:
    return reply(status, {"detail": "full", "code": code}, retry_after=retry_after, x_request_id="abc")


class Play:
    """Plays a server that gives the `outcomes` one after the other, and a clock that moves with pauses."""

    def __init__(self, outcomes: Sequence[Reply | Failure], timeout_s: float | None = 60.0) -> None:
        self.now = 0.0
        self.sent: list[Attempt] = []
        self.pauses: list[float] = []
        self._outcomes = iter(outcomes)
        self.core = Core(
            [("authorization", "Bearer k")], Backoff(3, lambda: 0.5), timeout_s, lambda: self.now
        )

    def predict(self, inputs: Any = ROWS, **options: Any) -> Any:
        return self.run(lambda: self.core.predict("m", recognise(inputs), Options(**options)))

    def run(self, begin: Callable[[], Any]) -> Any:
        steps, outcome = begin(), None
        while True:
            try:
                step = steps.send(outcome)
            except StopIteration as end:
                return end.value
            if isinstance(step, Pause):
                self.pauses.append(step.seconds)
                self.now += step.seconds
                outcome = None
            else:
                self.sent.append(step)
                outcome = next(self._outcomes)


def test_metadata_are_asked_for_once() -> None:
    play = Play([reply(200, METADATA), answer(), answer()])
    assert play.predict()["y"] == [7]
    assert play.predict().version == "3"
    assert [each.path for each in play.sent] == ["/v2/models/m", "/v2/models/m/infer", "/v2/models/m/infer"]
    assert all(("authorization", "Bearer k") in each.headers for each in play.sent)


def test_arrays_are_cast_before_they_are_sent() -> None:
    play = Play([reply(200, METADATA), answer()])
    play.predict([[1, 2]])
    header, tensor = play.sent[1].parts
    assert json.loads(bytes(header))["inputs"][0]["datatype"] == "FP32"
    assert bytes(tensor) == np.array([1, 2], np.float32).tobytes()


def test_a_model_that_has_changed_is_asked_again() -> None:
    newer = {**METADATA, "inputs": [{"name": "z", "datatype": "INT64", "shape": [-1, 2]}]}
    rejection = reply(422, {"error": "no input is called x", "code": "invalid_input"})
    play = Play([reply(200, METADATA), answer(), rejection, reply(200, newer), answer()])
    play.predict()
    play.predict([[1, 2]])
    assert json.loads(bytes(play.sent[-1].parts[0]))["inputs"][0]["name"] == "z"


def test_the_error_of_a_model_that_has_not_changed_is_raised() -> None:
    rejection = reply(422, {"error": "too many rows", "code": "invalid_input"})
    play = Play([reply(200, METADATA), answer(), rejection, reply(200, METADATA)])
    play.predict()
    with pytest.raises(errors.InvalidInput, match="too many rows"):
        play.predict()


def test_a_key_that_may_not_read_metadata_sends_npz() -> None:
    forbidden = reply(403, {"error": "the key lacks the scope read", "code": "forbidden"})
    found = reply(200, {"model": "m", "version": "1", "outputs": {"y": [1]}})
    play = Play([forbidden, found, found])
    play.predict()
    play.predict({"x": ROWS})
    assert [each.path for each in play.sent] == ["/v2/models/m", "/predict/m", "/predict/m"]
    assert ("content-type", "application/x-npy") in play.sent[1].headers
    assert ("content-type", "application/x-npz") in play.sent[2].headers


def test_refusals_are_repeated_when_the_server_says() -> None:
    play = Play([reply(200, METADATA), refusal(), refusal(429, "queue_full", "0"), answer()])
    play.predict()
    assert play.pauses == [2.05, 0.1]


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (422, "invalid_input", errors.InvalidInput),
        (500, "model_failed", errors.ModelFailed),
        (500, "model_crashed", errors.ModelCrashed),
        (504, "deadline_exceeded", errors.DeadlineExceeded),
        (401, "unauthorized", errors.Unauthorized),
    ],
)
def test_errors_that_a_repetition_cannot_change_are_raised_at_once(
    status: int, code: str, kind: type[errors.InferpoolError]
) -> None:
    play = Play([refusal(status, code)])
    with pytest.raises(kind) as raised:
        play.predict("a sentence")
    assert (raised.value.status, raised.value.request_id, raised.value.code) == (status, "abc", code)
    assert not play.pauses


def test_a_connection_that_breaks_is_tried_again_and_the_last_error_raised() -> None:
    play = Play([Failure("refused")] * 4)
    with pytest.raises(ServerUnreachable, match="refused"):
        play.predict("a sentence")
    assert play.pauses == [0.05, 0.1, 0.2]


def test_nothing_is_waited_for_beyond_the_deadline() -> None:
    play = Play([refusal(retry_after="5")])
    with pytest.raises(errors.Overloaded) as raised:
        play.predict("a sentence", timeout_s=4.0)
    assert raised.value.retry_after_s == 5
    assert not play.pauses


def test_the_server_is_told_what_is_left_of_the_timeout() -> None:
    found = reply(200, {"model": "m", "version": "1", "outputs": {"y": [1]}})
    play = Play([refusal(retry_after="1"), found])
    play.predict("a sentence", timeout_s=4.0)
    told = [dict(each.headers)["x-timeout-ms"] for each in play.sent]
    assert told == ["4000.000", "2950.000"]
    assert [each.timeout_s for each in play.sent] == [4.5, 3.45]


def test_a_client_without_a_timeout_tells_none() -> None:
    play = Play([reply(200, {"models": []})], timeout_s=None)
    assert play.run(play.core.models) == []
    assert "x-timeout-ms" not in dict(play.sent[0].headers)
    assert play.sent[0].timeout_s is None


def test_an_answer_that_takes_too_long_is_not_asked_for_again() -> None:
    play = Play([Failure("ReadTimeout", timed_out=True)])
    with pytest.raises(errors.DeadlineExceeded, match="no answer within the timeout"):
        play.predict("a sentence")


def test_frames_are_sent_as_json_to_a_server_without_arrow() -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"x": [1.5, float("nan")], "city": ["Bern", None]})
    found = reply(200, {"model": "m", "version": "1", "outputs": {"y": [1, 2]}})
    play = Play([reply(415, {"detail": "d", "code": "unsupported_media_type"}), found, found])
    play.predict(frame)
    play.predict(frame)
    types = [dict(each.headers)["content-type"] for each in play.sent]
    assert types == ["application/vnd.apache.arrow.stream", "application/json", "application/json"]
    assert json.loads(bytes(play.sent[2].parts[0])) == {"list": {"x": [1.5, None], "city": ["Bern", None]}}


@pytest.mark.parametrize(
    "answered",
    [
        Reply(200, {"content-type": "text/html"}, b"<html>"),
        Reply(200, {"content-type": "application/json"}, b"[]"),
        Reply(200, {"content-type": "application/json"}, b"{"),
        Reply(200, {"inference-header-content-length": "2"}, b"{}"),
        Reply(200, {"inference-header-content-length": "-9"}, b"{}"),
        Reply(302, {"location": "http://elsewhere"}, b""),
        Reply(200, {"content-type": "application/x-npz"}, b"PK"),
        Reply(502, {"content-type": "text/html"}, b"<html>bad gateway"),
        Reply(200, answer().headers, answer().body[:-1]),
    ],
)
def test_what_is_not_an_answer_of_inferpool_is_an_error_of_its_own(answered: Reply) -> None:
    play = Play([answered])
    with pytest.raises(UnexpectedAnswer):
        play.predict("a sentence")


def test_a_proxy_that_has_no_server_is_asked_again() -> None:
    found = reply(200, {"model": "m", "version": "1", "outputs": {"y": [1]}})
    play = Play([Reply(503, {"content-type": "text/html"}, b"<html>no upstream"), found])
    play.predict("a sentence")
    assert len(play.pauses) == 1


def test_every_code_of_the_server_has_its_class() -> None:
    for code, status in STATUSES.items():
        error = read_error(reply(status, {"detail": "d", "code": code, "tensor": "x"}))
        assert error.code == code
        assert error.members == {"tensor": "x"}
        assert type(error).__module__ == "inferpool.errors"
        assert isinstance(error, errors.Refused) == (status in (429, 503))


def test_a_code_of_a_newer_server_is_an_error_all_the_same() -> None:
    assert isinstance(read_error(reply(429, {"detail": "d", "code": "new"})), errors.Refused)
    assert isinstance(read_error(reply(410, {"detail": "d", "code": "new"})), errors.RequestError)
    assert read_error(reply(500, {"detail": "d", "code": "new"})).code == "new"


@pytest.mark.parametrize("value", [object(), [[1], [1, 2]], [None], {"x": [object()]}, 3j])
def test_what_no_model_takes_is_refused_before_it_is_sent(value: object) -> None:
    with pytest.raises(TypeError):
        recognise(value)
