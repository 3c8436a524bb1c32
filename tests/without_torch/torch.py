"""Found instead of torch by the processes that tests start: nothing of janus_jax may need it."""

raise ImportError("janus_jax must run without torch")
