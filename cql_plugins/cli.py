"""The command `cql-plugins`: look at data, convert it, score returns, list published settings."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line, and leave with its exit code."""
    try:
        from cql_plugins._commands import app
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("rich", "typer"):
            raise
        sys.exit(f'The command line needs {error.name}: {error}. Install it with: pip install "cql-plugins[cli]"')
    app(prog_name="cql-plugins")


if __name__ == "__main__":
    main()


__all__ = ["main"]
