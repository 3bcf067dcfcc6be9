"""The one exception that users are meant to see."""


class UserError(ValueError):
    """Something that the user can put right: a path, a value, a file, a server.

    The message names the thing, its value and the remedy; the jobs print it without a traceback.
    """
