"""The commands that change a running server: `load`, `unload`, `jobs`, `labels`, `traffic` and `rollback`."""

from __future__ import annotations

import argparse
import http.client
import json
import os
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote, urlsplit

from inferpool.system.files import printable

COMMANDS: Final = ("load", "unload", "jobs", "labels", "traffic", "rollback")
DEFAULT_URL: Final = "http://127.0.0.1:8000"
URL_VARIABLE: Final = "INFERPOOL_URL"
KEY_VARIABLE: Final = "INFERPOOL_KEY"
_TIMEOUT_S: Final = 70.0
_LOOK_S: Final = 0.2
"""Pause between two looks at a job."""
_BAR: Final = 24
"""Characters of the progress bar."""
WHERE: Final = (
    f"The server is --url, or {URL_VARIABLE}, or {DEFAULT_URL}. Its key is read from {KEY_VARIABLE}, never"
    " from the command line, which other users of the machine can see."
)


class AdminError(Exception):
    """The server cannot be reached, or refuses; the text is one sentence."""

    status = 1


class Interrupted(AdminError):
    """Somebody has pressed Ctrl-C while a command waited; the text says what goes on."""

    status = 130


def add_admin_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the commands to the parser of `inferpool`."""
    for name, text, description in (
        ("load", "load a model into a running server", "Load a model, or one version, beside those that"
         " serve; it takes over when it is ready. Waits, and shows how far the load is."),
        ("unload", "unload a model from a running server", "Answer the requests that a model, or one"
         " version, has accepted, and free its memory. Waits for the end."),
    ):  # fmt: skip
        command = _add_for_model(commands, name, text, description)
        command.add_argument(
            "version", metavar="VERSION", nargs="?", type=int, help="one version; without it, all"
        )
        if name == "load":
            command.add_argument(
                "--from",
                dest="source",
                metavar="SOURCE",
                help="fetch the version from there first: a store (s3://bucket/models/digits/3) or a path of"
                " the server's machine; the server's --load-from has the prefixes that are allowed",
            )
        command.add_argument("--no-wait", action="store_true", help="print the job and do not wait for it")
    command = _add(
        commands, "jobs", "list the loads and unloads of a running server",
        "List the jobs that run, and the last ones that have ended.",
    )  # fmt: skip
    command.add_argument("job", metavar="JOB", nargs="?", help="one job, which is waited for")
    command.add_argument("--cancel", action="store_true", help="cancel the job")
    command = _add_for_model(
        commands, "labels", "list and move the labels of a model",
        "List the labels of a model, or let one name another version. A label moves in one step, and only to"
        " a version that is ready.",
    )  # fmt: skip
    command.add_argument("label", metavar="LABEL=VERSION", nargs="?", help="the label to move: stable=2")
    command.add_argument("--remove", metavar="LABEL", help="a label to remove")
    _add_traffic(commands)
    _add_for_model(
        commands, "rollback", "go back to the version that answered before",
        "Go back to the version that answered before the present one: the label stable names it from then"
        " on. A canary that runs is ended.",
    )  # fmt: skip


def _add_for_model(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, text: str, description: str
) -> argparse.ArgumentParser:
    command = _add(commands, name, text, description)
    command.add_argument("model", metavar="MODEL", help="the name of the model")
    return command


def _add_traffic(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = _add(
        commands, "traffic", "show and change the canary and the shadow of a model",
        "Let a canary answer a share of the requests that name no version, or a shadow get copies of them."
        " Without --canary and --shadow, show what is counted of both.",
    )  # fmt: skip
    command.add_argument("model", metavar="MODEL", help="the name of the model")
    command.add_argument("--canary", metavar="VERSION", type=int, help="the version that answers a share")
    command.add_argument(
        "--share", type=_share, default=0.05, help="the canary's share of the requests, 5%% or 0.05 [5%%]"
    )
    command.add_argument(
        "--by",
        default="request_id",
        help="whose hash decides: request_id, key, tenant or header:NAME [request_id]",
    )
    command.add_argument(
        "--requests",
        type=int,
        default=1000,
        help="the canary is promoted once both versions have answered so many requests and it is not worse,"
        " and rolled back once it is certainly worse; 0 leaves that to you [1000]",
    )
    command.add_argument("--shadow", metavar="VERSION", type=int, help="the version that gets copies")
    command.add_argument(
        "--shadow-share", type=_share, default=1.0, help="the share of requests that are copied [100%%]"
    )
    command.add_argument("--stop", action="store_true", help="end the canary and the shadow")
    command.add_argument(
        "--wait", action="store_true", help="wait for the end of the canary; fail unless it is promoted"
    )


def _share(text: str) -> float:
    """A share as people write it, `5%` or `0.05`; raises ArgumentTypeError."""
    try:
        return float(text.removesuffix("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is no share; write 5% or 0.05") from None


def _add(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, text: str, description: str
) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=text, description=description, epilog=WHERE, allow_abbrev=False)
    command.add_argument("--url", help=f"the address of the server, or unix:PATH [{URL_VARIABLE}]")
    return command


def main(arguments: Sequence[str]) -> int:
    """Run one of these commands; returns its exit status.

    The parser of `inferpool` has the settings of servers as well. Its imports take longer than a command.
    """
    parser = argparse.ArgumentParser(prog="inferpool", allow_abbrev=False)
    add_admin_commands(parser.add_subparsers(dest="command", required=True))
    flags = vars(parser.parse_args(arguments))
    return run_admin_command(flags.pop("command"), flags, os.environ)


def run_admin_command(command: str, flags: Mapping[str, Any], environ: Mapping[str, str]) -> int:
    """Run a command.

    The exit status is 0, or 1 if the server cannot be reached, refuses, or a job fails; 130 after Ctrl-C.
    """
    server = RunningServer(
        flags["url"] or environ.get(URL_VARIABLE) or DEFAULT_URL, environ.get(KEY_VARIABLE)
    )
    try:
        if command in ("load", "unload"):
            body = {} if flags["version"] is None else {"version": flags["version"]}
            if flags.get("source") is not None:
                body["from"] = _source(flags["source"])
            job = server.ask("POST", f"{_path(flags['model'])}/{command}", body)
            return _print_job(job) if flags["no_wait"] else _wait(server, job)
        if command == "jobs":
            return _jobs(server, flags["job"], cancel=flags["cancel"])
        if command == "labels":
            return _labels(server, flags["model"], flags["label"], flags["remove"])
        if command == "traffic":
            return _traffic(server, flags)
        found = server.ask("POST", f"{_path(flags['model'])}/rollback")
        print(f"{printable(found['model'])}: version {found['version']} answers")
    except AdminError as error:
        print(f"inferpool: {printable(str(error))}", file=sys.stderr)
        return error.status
    return 0


def _source(text: str) -> str:
    """A source as the server reads it: a path without `://` is one of this machine."""
    return text if "://" in text else str(Path(text).absolute())


def _jobs(server: RunningServer, job_id: str | None, *, cancel: bool) -> int:
    if job_id is None:
        if cancel:
            raise AdminError("--cancel needs the id of a job; `inferpool jobs` lists them")
        for job in server.ask("GET", "/jobs")["jobs"]:
            _print_job(job)
        return 0
    path = f"/jobs/{quote(job_id, safe='')}"
    if cancel:
        return _print_job(server.ask("DELETE", path))
    return _wait(server, server.ask("GET", path))


def _labels(server: RunningServer, model: str, label: str | None, remove: str | None) -> int:
    path = _path(model)
    if remove is not None:
        server.ask("DELETE", f"{path}/labels/{quote(remove, safe='')}")
    if label is not None:
        name, equals, version = label.partition("=")
        if not equals or not version.isdecimal():
            raise AdminError(f"{label} is not LABEL=VERSION, as in stable=2")
        moved = server.ask("PUT", f"{path}/labels/{quote(name, safe='')}", {"version": int(version)})
        if not moved["kept"]:
            print("the folder of the model cannot be written: the label lasts until the next start")
    for name, number in sorted(server.ask("GET", path)["labels"].items()):
        print(f"{printable(name)} = {number}")
    return 0


def _traffic(server: RunningServer, flags: Mapping[str, Any]) -> int:
    path = f"/models/{quote(flags['model'], safe='')}/traffic"
    body: dict[str, Any] = {}
    if flags["canary"] is not None:
        body["canary"] = {
            "version": flags["canary"],
            "share": flags["share"],
            "by": flags["by"],
            "requests": flags["requests"],
        }
    if flags["shadow"] is not None:
        body["shadow"] = {"version": flags["shadow"], "share": flags["shadow_share"]}
    if flags["stop"]:
        if body:
            raise AdminError("--stop ends the canary and the shadow; leave out --canary and --shadow")
        server.ask("DELETE", path)
    if body:
        server.ask("PUT", path, body)
    found = server.ask("GET", path)
    try:
        while flags["wait"] and found["canary"] is not None and found["canary"]["state"] == "running":
            time.sleep(_LOOK_S)
            found = server.ask("GET", path)
    except KeyboardInterrupt:
        name = flags["model"]
        raise Interrupted(f"the canary goes on; `inferpool traffic {name} --stop` ends it") from None
    _print_traffic(flags["model"], found)
    return 1 if flags["wait"] and (found["canary"] or {}).get("state") != "promoted" else 0


def _print_traffic(model: str, found: Mapping[str, Any]) -> None:
    canary, shadow = found["canary"], found["shadow"]
    if canary is None and shadow is None:
        print(f"{printable(model)}: no canary and no shadow")
    if canary is not None:
        share = f"{100 * canary['share']:g} % of the requests, by {canary['by']}"
        print(printable(f"{model}: canary {canary['version']}  {canary['state']}  {share}"))
        for role in ("canary", "stable"):
            each = canary[role]
            counts = f"{each['requests']} requests  {each['failures']} failed"
            if each["p50_ms"] is not None:
                counts += f"  p50 {each['p50_ms']:g} ms  p99 {each['p99_ms']:g} ms"
            print(f"  version {each['version']}  {counts}")
        if canary["reason"]:
            print(f"  {printable(canary['reason'])}")
    if shadow is not None:
        counts = f"{shadow['compared']} compared, {shadow['failed']} failed, {shadow['dropped']} dropped"
        print(printable(f"{model}: shadow {shadow['version']}  {100 * shadow['share']:g} % copied  {counts}"))
        if shadow["changed_labels"] is not None:
            print(f"  {100 * shadow['changed_labels']:.3g} % of the rows have another best label")
        if shadow["sent_ms"] is not None:
            print(
                f"  {shadow['copy_ms']:g} ms a copy, {shadow['sent_ms']:g} ms the answers sent;"
                f" {100 * shadow['slower']:.3g} % of the copies took longer"
            )
        for each in shadow["outputs"]:
            print(
                printable(
                    f"  {each['name']}: {each['numbers']} numbers differ by {each['mean']:.3g} in the mean,"
                    f" and by {each['largest']:.3g} at most"
                )
            )


def _path(model: str) -> str:
    return f"/models/{quote(model, safe='')}"


def _wait(server: RunningServer, job: dict[str, Any]) -> int:
    """Show the progress of a job until it has ended."""
    shown = ""
    try:
        while job["state"] == "running":
            shown = _show(job, shown)
            time.sleep(_LOOK_S)
            job = server.ask("GET", f"/jobs/{job['id']}")
    except KeyboardInterrupt:
        print(file=sys.stderr)  # the terminal shows ^C behind the bar
        command = f"inferpool jobs {job['id']}"
        raise Interrupted(
            f"the job goes on; `{command}` waits for it, and `{command} --cancel` ends it"
        ) from None
    if sys.stderr.isatty():
        sys.stderr.write("\r\033[K")
    return _print_job(job)


def _show(job: Mapping[str, Any], shown: str) -> str:
    """Show how far a job is: a bar on a terminal, else a line for each phase. Returns what is shown."""
    phase = (job["phase"] or "waiting").replace("_", " ")
    if not sys.stderr.isatty():
        if phase != shown:
            print(f"{printable(job['model'])}: {phase}", file=sys.stderr)
        return str(phase)
    full = round(_BAR * job["share"])
    left = "" if job["seconds_left"] is None else f"  about {job['seconds_left']:.0f} s left"
    bar = f"[{'#' * full}{'.' * (_BAR - full)}] {100 * job['share']:3.0f} %  {phase}{left}"
    sys.stderr.write(f"\r\033[K{bar}")
    sys.stderr.flush()
    return bar


def _print_job(job: Mapping[str, Any]) -> int:
    versions = f"/{', '.join(map(str, job['versions']))}" if job["versions"] else ""
    why = f": {job['reason']}" if job["reason"] else ""
    print(printable(f"{job['id']}  {job['kind']:<6}  {job['model']}{versions}  {job['state']}{why}"))
    return 1 if job["state"] in ("failed", "cancelled") and job["kind"] == "load" else 0


class RunningServer:
    """A running server."""

    def __init__(self, url: str, key: str | None) -> None:
        self._url = url
        self._key = key

    def ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The JSON answer to a request; raises AdminError."""
        headers = {"accept": "application/json"}
        if self._key:
            headers["authorization"] = f"Bearer {self._key}"
        content = None
        if body is not None:
            content = json.dumps(body)
            headers["content-type"] = "application/json"
        connection = self._connect()
        try:
            connection.request(method, path, content, headers)
            reply = connection.getresponse()
            data = reply.read()
        except (OSError, http.client.HTTPException) as error:
            raise AdminError(f"{self._url} cannot be reached: {error}") from error
        finally:
            connection.close()
        try:
            answer = json.loads(data)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise AdminError(f"{self._url} answered with status {reply.status}, and not as Inferpool does")
        if reply.status >= 400:
            raise AdminError(str(answer.get("detail") or f"status {reply.status}"))
        return answer

    def _connect(self) -> http.client.HTTPConnection:
        if self._url.startswith("unix:"):
            return _UnixConnection(self._url.removeprefix("unix:").removeprefix("//"))
        parts = urlsplit(self._url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise AdminError(f"{self._url} is no address; expected http://HOST:PORT, https:// or unix:PATH")
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        return kind(parts.hostname, parts.port, timeout=_TIMEOUT_S)


class _UnixConnection(http.client.HTTPConnection):
    """A connection to a Unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=_TIMEOUT_S)
        self._path = os.fspath(path)

    def connect(self) -> None:
        """Connect to the path."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)
