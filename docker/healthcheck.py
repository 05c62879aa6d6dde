"""The HEALTHCHECK of the image: exits with 0 if the server in this container is ready, else with 1.

The check uses a plain socket. It starts a new Python every few seconds, and the import of an HTTP client
would cost more than the check itself.
"""

import os
import socket
import sys
from pathlib import Path

REQUEST = b"GET /health/ready HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
TIMEOUT_S = 4


def main() -> int:
    """Ask the server that the variables INFERPOOL_* describe. The check cannot see flags, as --port."""
    try:
        with connect() as connection:
            connection.sendall(REQUEST)
            status = connection.recv(64).partition(b"\r\n")[0]
    except OSError as error:
        print(error, file=sys.stderr)
        return 1
    print(status.decode("latin-1"))
    return 0 if b" 200 " in status else 1


def find_port() -> int:
    """Return the port of the server, by the rules of `inferpool.platforms`."""
    for name in ("INFERPOOL_PORT", "SAGEMAKER_BIND_TO_PORT", "AIP_HTTP_PORT", "PORT"):
        text = os.environ.get(name, "")
        if text and "://" not in text:
            return int(text)
    found_by_name = "INFERPOOL_REPOSITORY" in os.environ
    return 8080 if Path("/opt/ml/model").is_dir() and not found_by_name else 8000


def connect() -> socket.socket:
    """Connect to the server in this container; raises OSError."""
    if path := os.environ.get("INFERPOOL_UNIX_SOCKET"):
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(TIMEOUT_S)
        connection.connect(path)
    else:
        connection = socket.create_connection(("127.0.0.1", find_port()), timeout=TIMEOUT_S)
    if certificate := os.environ.get("INFERPOOL_TLS_CERTIFICATE_FILE"):
        import ssl

        # The name in the certificate is that of the service, not of this container.
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        if os.environ.get("INFERPOOL_TLS_CLIENT_CA_FILE"):
            # A server that asks for certificates of clients is shown its own.
            context.load_cert_chain(certificate, os.environ.get("INFERPOOL_TLS_KEY_FILE"))
        connection = context.wrap_socket(connection)
    return connection


if __name__ == "__main__":
    sys.exit(main())
