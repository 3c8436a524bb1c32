"""Generates images from a prompt, or answers questions about images; see --help.

python sample.py --prompt "a red circle left of a blue square"
python sample.py --image a.png --question "What is in the image?"

The code is in janus_jax/commands/sample.py.
"""

from janus_jax.commands.program import set_up_program
from janus_jax.commands.sample import main

if __name__ == "__main__":
    set_up_program()
    main()
