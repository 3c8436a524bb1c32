"""python -m convert: converts PyTorch checkpoints of Janus to Orbax and back."""

from janus_jax.flags import set_up_program
from janus_jax.interop.cli import main

if __name__ == "__main__":
    set_up_program()
    main()
