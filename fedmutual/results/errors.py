"""The error of everything that reads or writes a results folder."""


class ResultsError(RuntimeError):
    """A results folder cannot be used as asked; the message names it and says what to do."""
