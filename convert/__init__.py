"""Commands that convert checkpoint folders: `python -m convert --help`."""
