"""`python -m inferpool` is the `inferpool` command."""

from __future__ import annotations

from inferpool.system.imports import no_collections, without_plugins


def main() -> int:
    """Run the command; returns its exit status."""
    without_plugins()
    with no_collections():
        from inferpool import cli
    return cli.main()


if __name__ == "__main__":
    raise SystemExit(main())
