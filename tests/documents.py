"""What the tests of the README and of the documentation share: Python blocks in Markdown, and how they are run.

Every ```python block is executed, in order, each in a namespace and an empty folder of its own. An HTML comment in
front of the block, invisible to readers, can change that:

    <!-- not run: reason -->                  leave this block out, and say why
    <!-- continues -->                        share the namespace of the block before
    <!-- in tests: 100_000 -> 20; a -> b -->  replace text, so that what trains for an hour there trains for a second

A replacement that finds nothing to replace is an error: the page has changed under it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces

from cql_plugins.adapters import from_arrays

BLOCK = re.compile(
    r"(?P<comments>(?:^[ \t]*<!--(?:(?!-->).)*-->[ \t]*\n(?:[ \t]*\n)*)*)"  # comments, blank lines allowed after each
    r"^```python[ \t]*\n(?P<code>.*?)^```[ \t]*$",
    re.MULTILINE | re.DOTALL,
)
COMMENT = re.compile(r"<!--\s*(?P<text>.*?)\s*-->", re.DOTALL)


@dataclass(frozen=True)
class Block:
    """One block of code, as the page shows it and as the test runs it."""

    line: int
    code: str
    skip: str | None
    continues: bool


def parse(text: str) -> list[Block]:
    """All python blocks of a Markdown text, with their comments applied."""
    blocks = []
    for match in BLOCK.finditer(text):
        line = text.count("\n", 0, match.start("code")) + 1
        code, skip, continues = match["code"], None, False
        for comment in COMMENT.finditer(match["comments"]):
            keyword, _, value = comment["text"].partition(":")
            if keyword == "not run":
                skip = value.strip()
                if not skip:
                    raise ValueError(f"line {line}: 'not run' needs a reason")
            elif keyword == "continues":
                continues = True
            elif keyword == "in tests":
                for replacement in value.split(";"):
                    old, arrow, new = (part.strip() for part in replacement.partition("->"))
                    if not arrow or old not in code:
                        raise ValueError(f"line {line}: nothing to replace for {replacement.strip()!r}")
                    code = code.replace(old, new)
        blocks.append(Block(line, code, skip, continues))
    return blocks


def chains(blocks: list[Block]) -> list[list[Block]]:
    """Blocks grouped so that each that continues another follows it."""
    grouped: list[list[Block]] = []
    for block in blocks:
        if block.continues and grouped:
            grouped[-1].append(block)
        else:
            grouped.append([block])
    return grouped


OPTIONAL = (
    *("d3rlpy", "gymnasium_robotics", "h5py", "matplotlib", "minari", "onnx", "onnxruntime", "onnxscript", "pyarrow", "ray"),
    *("rich", "rl_zoo3", "safetensors", "sb3_contrib", "tensorboard", "tqdm", "typer", "wandb"),
)
"""What a block may import besides the core."""


def door() -> None:
    """A stand-in for D4RL's door set, so that an example needs no download: its spaces, random contents."""
    rng = np.random.default_rng(0)
    walks = rng.normal(size=(2, 21, 39))
    from_arrays(
        walks[:, :-1].reshape(40, 39),
        rng.uniform(-1, 1, size=(40, 28)).astype(np.float32),
        rng.normal(size=40),
        np.zeros(40, dtype=bool),
        np.arange(40) % 20 == 19,
        next_observations=walks[:, 1:].reshape(40, 39),
        observation_space=spaces.Box(-np.inf, np.inf, (39,), np.float64),
        action_space=spaces.Box(-1, 1, (28,), np.float32),
    ).to_minari("D4RL/door/human-v2")


def pointmaze() -> None:
    """A stand-in for PointMaze's set: random actions in the environment itself, since rewards have to be those of its goals."""
    gymnasium_robotics = pytest.importorskip("gymnasium_robotics")
    gym.register_envs(gymnasium_robotics)
    env = gym.make("PointMaze_UMaze-v3", max_episode_steps=10)
    env.action_space.seed(0)
    steps = []
    observation, _ = env.reset(seed=0)
    for _ in range(20):
        action = env.action_space.sample()
        following, reward, _, truncated, _ = env.step(action)
        steps.append((observation, action, reward, truncated, following))
        observation = env.reset()[0] if truncated else following
    before, actions, rewards, truncations, after = zip(*steps, strict=True)
    from_arrays(
        {key: np.stack([o[key] for o in before]) for key in env.observation_space},
        np.stack(actions),
        np.array(rewards),
        np.zeros(20, dtype=bool),
        np.array(truncations),
        next_observations={key: np.stack([o[key] for o in after]) for key in env.observation_space},
        observation_space=env.observation_space,
        action_space=env.action_space,
    ).to_minari("D4RL/pointmaze/umaze-v2")
    env.close()


STAND_INS = {"D4RL/door/human-v2": door, "D4RL/pointmaze/umaze-v2": pointmaze}


def marked(page: Path) -> list[Any]:
    """The chains of a page as parameters of a test, each with its line for a name."""
    return [pytest.param(chain, id=f"line-{chain[0].line}") for chain in chains(parse(page.read_text("utf-8")))]


def run(chain: list[Block], page: Path) -> None:
    """Run the blocks of a chain in one namespace; skips where they need what is not installed."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    absent = [module for module in OPTIONAL if find_spec(module) is None]
    for name, write in STAND_INS.items():
        if any(name in block.code for block in chain):
            for module in ("minari", "h5py"):
                pytest.importorskip(module)
            write()
    for block in chain:
        if block.skip:
            pytest.skip(f"{page.name} line {block.line}: {block.skip}")
        try:
            # Leading newlines make a traceback show the page's own line numbers.
            exec(compile("\n" * (block.line - 1) + block.code, str(page), "exec"), namespace)
        except ImportError as error:
            # What the block itself imports, or our own word that names the extra.
            if error.name not in absent and not (absent and "cql-plugins[" in str(error)):
                raise
            pytest.skip(f"{page.name} line {block.line}: {error}")
