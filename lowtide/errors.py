"""What lowtide says when it cannot go on: what was found, what was expected, and the way out."""


class BadInput(ValueError):
    """One clear sentence for the user; the command line prints it and exits with 2."""

    def __init__(self, found: str, expected: str, way_out: str):
        self.found, self.expected, self.way_out = found, expected, way_out
        super().__init__(f"{found}; expected {expected}; {way_out}")
