"""URLs, headers, statuses and sockets; nothing below this package knows them."""
