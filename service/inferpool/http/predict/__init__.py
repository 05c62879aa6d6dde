"""One prediction, whatever its API: from a request to an entry, and from a result to a response."""
