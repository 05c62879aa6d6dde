"""The command with batched reads for every connection, however few requests there are."""

from functools import partial

from tests.servers import run


def patch() -> None:
    """Let every batch of reads begin at one request."""
    from inferpool.http.connection import batched_reads

    batched_reads.ReadBatcher = partial(batched_reads.ReadBatcher, 1)  # type: ignore[assignment, misc]


if __name__ == "__main__":
    run("always_batched_reads")
