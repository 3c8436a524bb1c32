"""python -m convert: converts PyTorch checkpoints of Janus to Orbax and back."""

from janus_jax.commands.convert import main
from janus_jax.commands.terminal import set_up_program

if __name__ == "__main__":
    set_up_program()
    main()
