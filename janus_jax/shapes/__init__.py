"""The drawn world of the shipped model janus_tiny: scenes, questions, checker and training."""
