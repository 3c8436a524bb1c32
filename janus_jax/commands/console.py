"""The console commands that installing the package creates (`console_scripts` in setup.cfg).

They run the same code as the scripts of a clone: sample.py, train.py and `python -m convert`.
"""

from janus_jax.commands.terminal import set_up_program


def sample() -> None:
    """Runs janus-sample."""
    from janus_jax.commands.sample import main

    set_up_program()
    main(command="janus-sample")


def convert() -> None:
    """Runs janus-convert."""
    from janus_jax.commands.convert import main

    set_up_program()
    main(command="janus-convert")


def train() -> None:
    """Runs janus-train."""
    from janus_jax.commands.train import main

    main(command="janus-train")
