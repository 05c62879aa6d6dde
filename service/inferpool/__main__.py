"""`python -m inferpool` is the `inferpool` command."""

from inferpool.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
