"""The command lines of this package: sampling, training, conversion and comparison."""
