"""The one error class that entry points turn into a single line and exit code 2."""

from __future__ import annotations

import sys
from collections.abc import Callable


class UserError(Exception):
    """Something the user can mend: a path, a key, a checkpoint of another model. The message says it all."""


def run_command(main: Callable[[], object]) -> None:
    """Run an entry point; a UserError becomes one line on stderr and exit code 2, Ctrl-C 130."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
