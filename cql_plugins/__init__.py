"""Conservative Q-learning (CQL) and Cal-QL for the libraries people already use.

This root imports nothing but itself, so that each room costs only its own dependencies:

* `cql_plugins.adapters` reads and writes offline datasets;
* `cql_plugins.sb3` holds the algorithms for Stable-Baselines3;
* `cql_plugins.d3rlpy` holds those for d3rlpy;
* `cql_plugins.losses` and `cql_plugins.returns` are the maths that they share.
"""

__all__ = ["__version__"]

# The one place the version is written: the build reads this literal without importing anything.
__version__ = "0.1.0"
