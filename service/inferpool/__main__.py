"""`python -m inferpool` is the `inferpool` command."""

from __future__ import annotations

import sys

from inferpool.system.imports import kept_imports, no_collections, without_plugins


def main() -> int:
    """Run the command; returns its exit status."""
    without_plugins()
    arguments = sys.argv[1:]
    if arguments[:1] != ["serve"]:
        with no_collections():
            from inferpool import admin_commands
        if arguments and arguments[0] in admin_commands.COMMANDS:
            return admin_commands.main(arguments)
    with kept_imports():
        from inferpool import cli
    return cli.main()


if __name__ == "__main__":
    raise SystemExit(main())
