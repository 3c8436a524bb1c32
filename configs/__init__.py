"""Configs of training runs: each module has a function get_config() that returns a ConfigDict.

A clone has them in configs/, and janus_jax/configs is a symbolic link to that folder. An installed
package has them as janus_jax.configs. Import them by that name, which works for both.
"""
