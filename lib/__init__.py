"""Keys and values, memory, files, the command line, the screen: nothing here is in the paper."""


class UserError(Exception):
    """Something the person at the keyboard can put right; scripts print it in one line and exit with code
    2."""
