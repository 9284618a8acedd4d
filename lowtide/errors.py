"""The error for bad input: what was found, what was expected, and the way out."""


class BadInput(ValueError):
    """Input that lowtide cannot use. The command line prints the message and exits with code 2."""

    def __init__(self, found: str, expected: str, way_out: str):
        self.found = found
        self.expected = expected
        self.way_out = way_out
        super().__init__(f"{found}; expected {expected}; {way_out}")
