"""Generates images from a prompt, or answers questions about images; see --help.

python sample.py --prompt "a red circle left of a blue square"
python sample.py --image a.png --question "What is in the image?"

The code is in janus_jax/commands/sample.py.
"""

from janus_jax.commands.sample import main
from janus_jax.commands.terminal import set_up_program

if __name__ == "__main__":
    set_up_program()
    main()
