"""One TCP connection: bytes in, bytes out. It knows no model."""
