"""The HEALTHCHECK of the image: exits with 0 if the server in this container is ready, else with 1.

The check uses a plain socket. It starts a new Python every few seconds, and the import of an HTTP client
would cost more than the check itself.
"""

import os
import socket
import sys

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


def connect() -> socket.socket:
    """Connect to the server in this container; raises OSError."""
    if path := os.environ.get("INFERPOOL_UNIX_SOCKET"):
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(TIMEOUT_S)
        connection.connect(path)
    else:
        port = int(os.environ.get("INFERPOOL_PORT", "8000"))
        connection = socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT_S)
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
