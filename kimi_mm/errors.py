"""Errors that a user can act on; the command line prints their message without a traceback."""


class UserError(ValueError):
    """Something the caller gave cannot be used; the message says what was wrong and what to do."""


class AudioError(UserError):
    """A recording that cannot be read or used."""


class ImageError(UserError):
    """A picture or clip that cannot be read or used."""


class CheckpointError(UserError):
    """A checkpoint or dataset on disk that is missing, damaged or of another kind; names the file and the key."""
