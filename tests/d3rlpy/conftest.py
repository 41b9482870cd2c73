"""Helpers of the d3rlpy tests. Without d3rlpy they are skipped."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch as th

collect_ignore_glob: list[str] = []
try:
    import_module("cql_plugins.d3rlpy")
except ImportError:
    collect_ignore_glob = ["test_*.py"]


class Noise:
    """One stream of normal and one of uniform numbers, for whoever asks next: two codes that ask in the same order get the
    same, whatever the layout in which they ask.
    """

    def __init__(self, seed: int) -> None:
        self.normal_source = th.Generator().manual_seed(seed)
        self.uniform_source = th.Generator().manual_seed(seed + 1)

    def normal(self, *shape: int) -> th.Tensor:
        return th.zeros(shape).normal_(generator=self.normal_source)

    @contextmanager
    def injected(self) -> Iterator[None]:
        """Replace what d3rlpy, SB3 and the losses draw from."""
        rsample, randn, uniform = th.distributions.Normal.rsample, th.randn, th.Tensor.uniform_

        def from_distribution(distribution: Any, shape: Any = ()) -> th.Tensor:
            batch, size = distribution.loc.shape
            if not shape:
                return distribution.loc + distribution.scale * self.normal(batch, size)
            return distribution.loc + distribution.scale * self.normal(batch, shape[0], size).transpose(0, 1)

        def from_randn(*shape: int, **_: Any) -> th.Tensor:
            return self.normal(*shape)

        def from_uniform(tensor: th.Tensor, low: float = 0.0, high: float = 1.0) -> th.Tensor:
            return uniform(tensor, low, high, generator=self.uniform_source)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(th.distributions.Normal, "rsample", from_distribution)
            patch.setattr(th, "randn", from_randn)
            patch.setattr(th.Tensor, "uniform_", from_uniform)
            yield
        assert th.distributions.Normal.rsample is rsample
        assert th.randn is randn


@pytest.fixture
def noise() -> Callable[[int], Noise]:
    return Noise


@pytest.fixture(autouse=True)
def seeded() -> None:
    """d3rlpy draws from the global generators."""
    np.random.seed(0)
    th.manual_seed(0)


@pytest.fixture(autouse=True)
def quiet_log() -> Iterator[None]:
    """d3rlpy logs to standard output; only its warnings are of interest here."""
    import logging

    import structlog

    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    yield
    structlog.reset_defaults()
