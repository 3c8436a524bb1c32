"""What the commands' flags have in common."""

import argparse
from typing import NoReturn


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors take one line, which starts with the name of the command."""

    def __init__(self, name: str, **settings):
        super().__init__(**settings)
        self._name = name

    def error(self, message: str) -> NoReturn:
        """Ends the program with status 2."""
        self.exit(2, f"{self._name}: {message}\n")
