"""The synthetic world of janus_tiny: scenes, questions, checker, and training of its encoders."""
