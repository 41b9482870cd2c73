"""Nested dict observations without the nesting: Stable-Baselines3 knows one level of keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gymnasium import spaces

SEPARATOR = "/"
"""Between the keys of two levels; not a dot, which torch refuses in the names of modules."""


def is_nested(space: spaces.Space[Any]) -> bool:
    """Whether a Dict space has Dict spaces in it."""
    return isinstance(space, spaces.Dict) and any(isinstance(subspace, spaces.Dict) for subspace in space.values())


def flatten_space(space: spaces.Space[Any]) -> spaces.Space[Any]:
    """Give each leaf of a nested Dict space a key of its own, ``"desired_goal/microwave"``.

    Args:
        space: Any space.

    Returns:
        A Dict space of one level; the space itself where it is not nested.

    Raises:
        ValueError: If two leaves would have one key.
    """
    return spaces.Dict(flatten_tree(space.spaces)) if isinstance(space, spaces.Dict) and is_nested(space) else space


def flatten_tree(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Give each leaf of nested mappings (or Dict spaces) a key of its own; leaves are not copied.

    Args:
        tree: Mapping of leaves and mappings.

    Returns:
        One level, in the order of the leaves.

    Raises:
        ValueError: If two leaves would have one key.
    """
    flat: dict[str, Any] = {}
    for key, branch in tree.items():
        inner = branch.spaces if isinstance(branch, spaces.Dict) else branch
        leaves = (
            {f"{key}{SEPARATOR}{name}": leaf for name, leaf in flatten_tree(inner).items()}
            if isinstance(inner, Mapping)
            else {key: branch}
        )
        if taken := flat.keys() & leaves.keys():
            raise ValueError(f"Two leaves would have the key {sorted(taken)[0]!r} without the nesting; rename one of them.")
        flat |= leaves
    return flat
