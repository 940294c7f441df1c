"""`python -m growmoe`: the command line, or one line on what it lacks."""

import sys


def main() -> None:
    """Run the command line; a missing package is one line on standard error, exit code 2."""
    try:
        from growmoe import cli
    except ImportError as error:
        print(f"growmoe: {error}", file=sys.stderr)
        sys.exit(2)
    cli.main()


if __name__ == "__main__":
    main()
