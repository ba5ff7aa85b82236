"""The exceptions that mean: the input is at fault, and here is what to do about it."""


class InputError(ValueError):
    """Says in one sentence what is wrong with an input and what to do; the command line prints it and exits with 2."""


class DamagedError(InputError):
    """A file that was whole once and is not any more: cut off, or with other content than it was written with."""
