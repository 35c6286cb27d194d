"""What may be skipped: keys and values, memory, files, the command line, the screen. Nothing here is in the paper."""


class UserError(Exception):
    """Something the person at the keyboard can put right; scripts print it in one line and exit with code
    2."""
