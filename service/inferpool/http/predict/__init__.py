"""One prediction, whatever its API: from a request head and body to an entry, and from a result to a response."""
