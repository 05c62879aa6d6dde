"""Measures what TLS costs a request, beside what OpenSSL itself takes for its records.

    python benchmarks/tls.py models --model digits --body body.json [--rounds 5] [--serve="..."]

starts two servers, one of them with TLS, and lets `wrk` send both the same requests in turns: over 64
connections, then over one. It prints the CPU time of a request, of all processes and threads of a server, as
the median of the rounds, the difference, and what OpenSSL takes to decrypt a request and to encrypt a
response of these sizes in memory. CPU time, because a busy machine changes it less than seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import shlex
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

PORTS = {"plain": 8197, "tls": 8198}
CONNECTIONS = (64, 1)
_RECORDS = 20_000
_HEAD_BYTES = 200


def process_tree(process: int) -> list[int]:
    """Return a process and all that it has started."""
    found = [process]
    for children in Path(f"/proc/{process}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in children.read_text().split():
                found += process_tree(int(child))
    return found


def cpu_s(server: int) -> float:
    """Return the CPU seconds that all threads of a server have used, to the nanosecond."""
    nanoseconds = 0
    for process in process_tree(server):
        for times in Path(f"/proc/{process}/task").glob("*/schedstat"):
            with contextlib.suppress(OSError):
                nanoseconds += int(times.read_text().split()[0])
    return nanoseconds / 1e9


def ask(kind: str, path: str, body: bytes | None = None) -> bytes:
    """Return the response of a server, which may not be there yet."""
    scheme = "https" if kind == "tls" else "http"
    request = urllib.request.Request(
        f"{scheme}://127.0.0.1:{PORTS[kind]}{path}", body, {"content-type": "application/json"}
    )
    unverified = ssl._create_unverified_context() if kind == "tls" else None
    with urllib.request.urlopen(request, timeout=30, context=unverified) as response:
        answer: bytes = response.read()
        return answer


def wait_ready(kind: str) -> None:
    """Wait until a server is ready."""
    while True:
        with contextlib.suppress(OSError):
            ask(kind, "/health/ready")
            return
        time.sleep(0.2)


def answered(kind: str) -> int:
    """Return how many requests a server has answered."""
    lines = ask(kind, "/metrics").decode().splitlines()
    return sum(int(float(line.split()[-1])) for line in lines if line.startswith("inferpool_requests_total{"))


def load(kind: str, server: int, path: str, script: Path, connections: int, seconds: float) -> float:
    """Send requests, and return the microseconds of CPU time that the server took for each in `seconds`.

    The handshakes are over before.
    """
    url = f"{'https' if kind == 'tls' else 'http'}://127.0.0.1:{PORTS[kind]}{path}"
    first = answered(kind)
    command = ["wrk", "-t1", f"-c{connections}", "-d1h", "-s", str(script), url]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as client:
        try:
            while (before := answered(kind)) < first + 10 * connections:
                time.sleep(0.1)
            used_s = cpu_s(server)
            time.sleep(seconds)
            used_s = cpu_s(server) - used_s
            return 1e6 * used_s / (answered(kind) - before)
        finally:
            client.terminate()


def openssl_us(certificate: Path, key: Path, request_bytes: int, response_bytes: int) -> float:
    """Return the microseconds that OpenSSL takes to decrypt a request and to encrypt a response."""
    own, other = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    own.load_cert_chain(certificate, key)
    other.check_hostname, other.verify_mode = False, ssl.CERT_NONE
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = own.wrap_bio(to_server, to_client, server_side=True)
    client = other.wrap_bio(to_client, to_server)
    for side in (client, server, client, server):
        with contextlib.suppress(ssl.SSLWantReadError):
            side.do_handshake()
    with contextlib.suppress(ssl.SSLWantReadError):
        client.read(1)
    sent = []
    for _ in range(_RECORDS):
        client.write(bytes(request_bytes))
        sent.append(to_server.read())
    response = bytes(response_bytes)
    began = time.process_time()
    for records in sent:
        to_server.write(records)
        server.read(len(records))
        server.write(response)
        to_client.read()
    return 1e6 * (time.process_time() - began) / _RECORDS


def main() -> None:
    """Run the measurement, and print it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("repository", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--body", type=Path, required=True, help="a file with the body of a request")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--serve", default="", help="more flags of inferpool serve, as one text")
    arguments = parser.parse_args()
    body, path = arguments.body.read_bytes(), f"/predict/{arguments.model}"
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        certificate, key, script = (Path(folder) / name for name in ("tls.crt", "tls.key", "post.lua"))
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes",
             "-keyout", key, "-out", certificate, "-subj", "/CN=localhost"],
            capture_output=True, check=True,
        )  # fmt: skip
        script.write_text(
            f'wrk.method = "POST"\nwrk.headers["content-type"] = "application/json"\n'
            f"wrk.body = [==[{body.decode()}]==]\n"
        )
        servers = {}
        for kind, port in PORTS.items():
            flags = ["--port", str(port), "--log-level", "error", *shlex.split(arguments.serve)]
            if kind == "tls":
                flags += ["--tls-certificate-file", str(certificate), "--tls-key-file", str(key)]
            command = [sys.executable, "-m", "inferpool", "serve", str(arguments.repository), *flags]
            servers[kind] = subprocess.Popen(command)
            stack.callback(servers[kind].wait)
            stack.callback(servers[kind].terminate)
        for kind in servers:
            wait_ready(kind)
        response_bytes = _HEAD_BYTES + len(ask("tls", path, body))
        openssl = openssl_us(certificate, key, _HEAD_BYTES + len(body), response_bytes)
        print(f"OpenSSL alone: {openssl:.1f} us a request")
        for connections in CONNECTIONS:
            taken: dict[str, list[float]] = {kind: [] for kind in servers}
            for turn in range(arguments.rounds):
                for kind in sorted(servers, reverse=turn % 2 == 1):
                    process = servers[kind].pid
                    taken[kind].append(load(kind, process, path, script, connections, arguments.seconds))
            plain, tls = (statistics.median(taken[kind]) for kind in PORTS)
            pairs = zip(taken["plain"], taken["tls"], strict=True)
            more = statistics.median(with_tls - without for without, with_tls in pairs)
            print(
                f"{connections:>2} connections: plain {plain:.1f} us, TLS {tls:.1f} us, {more:+.1f} us in the"
                " median pair",
                flush=True,
            )


if __name__ == "__main__":
    main()
