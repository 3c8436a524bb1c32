"""Compiles a job for TPUs or GPUs that need not be there; see --help.

python -m janus_jax.compile_for --device h100 --model janus_pro_7b --job draw --num_images 4

The code is in janus_jax/commands/compile_for.py.
"""

from janus_jax.commands.compile_for import main

if __name__ == "__main__":
    main()
