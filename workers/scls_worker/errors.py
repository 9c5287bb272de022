"""What keeps a worker from starting, for the person who starts it."""


class StartupError(Exception):
    """One clear sentence, no traceback: the folder, the options or the machine is at fault, not the worker."""
