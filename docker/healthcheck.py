"""The HEALTHCHECK of the image: exits with 0 if the server in this container is ready, else with 1.

The check uses a plain socket. It starts a new Python every few seconds, and the import of an HTTP client
would cost more than the check itself.
"""

import os
import socket
import sys

REQUEST = b"GET /health/ready HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"


def main() -> int:
    """Ask the server at INFERPOOL_PORT whether it is ready. The check cannot see a flag --port."""
    port = int(os.environ.get("INFERPOOL_PORT", "8000"))
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=4) as connection:
            connection.sendall(REQUEST)
            status = connection.recv(64).partition(b"\r\n")[0]
    except OSError as error:
        print(error, file=sys.stderr)
        return 1
    print(status.decode("latin-1"))
    return 0 if b" 200 " in status else 1


if __name__ == "__main__":
    sys.exit(main())
