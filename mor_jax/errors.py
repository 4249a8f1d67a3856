"""The one exception a person is meant to read.

Everything that can go wrong because of an input (a config, a file, a checkpoint, a prompt) is
raised as
`UserError` with a message that names the thing, says what was expected and what to do. Commands
print it without a traceback and exit with status 2; a notebook sees an ordinary exception.
"""


class UserError(Exception):
    """A problem with something the user supplied; the message says what, why and what to do.

    `everywhere`: in a job of several processes, whether all of them raise it together, so that none
    has to tell.
    """

    everywhere = False


class ConfigError(UserError):
    """A configuration field that is unknown, impossible or contradicts another one."""


class DataError(UserError):
    """A corpus, tokenizer or data cache that cannot be used as asked."""


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged, unwritable or does not fit the model."""
