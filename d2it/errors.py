"""The one error class that entry points turn into a single line and exit code 2."""


class UserError(Exception):
    """Something the user can mend: a path, a key, a checkpoint of another model. The message says it all."""
