"""CQL for continuous and discrete actions as d3rlpy algorithms."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar, Literal, Self

import d3rlpy
from d3rlpy.algos.qlearning.torch.cql_impl import CQLImpl as HostCQLImpl
from d3rlpy.algos.qlearning.torch.cql_impl import DiscreteCQLImpl as HostDiscreteCQLImpl
from d3rlpy.base import DeviceArg
from d3rlpy.types import Shape

from cql_plugins import losses
from cql_plugins.d3rlpy.impl import CQLImpl, DiscreteCQLImpl
from cql_plugins.d3rlpy.offline import OfflineToOnlineMixin, adopt_signatures, register_once
from cql_plugins.ensembles import PRECISIONS, Precision, warn_of_slow_bf16
from cql_plugins.losses import CQLVariant

OfflineFraction = float | Literal["proportional"]
_QUANTILES = (d3rlpy.models.QRQFunctionFactory, d3rlpy.models.IQNQFunctionFactory)


# Continuous actions --------------------------------------------------------------------------------------------------


@dataclasses.dataclass()
class CQLConfig(d3rlpy.algos.CQLConfig):
    """Config of Conservative Q-Learning, with d3rlpy's fields and ours.

    The critic minimises ``1/2 sum_j [ mean (Q_j - y)^2 + conservative_weight * mean gap_j ]``, where the gap is a soft maximum
    of Q over actions minus Q at the data's action (Kumar et al. 2020, arXiv 2006.04779, Eq. 4). The weight means what it
    means in d3rlpy; the paper's ``alpha`` is half of it.

    What differs from d3rlpy's own CQL: the Lagrange multiplier is off, the Bellman target takes a sampled action instead of the
    policy's mean, the loss has the global half of the paper (which Adam sees in its epsilon alone), and the multiplier, where
    it is on, is stepped after it was used. ``conventions="d3rlpy"`` switches these four back, see :meth:`from_d3rlpy`.

    Args:
        alpha_learning_rate: Learning rate of the Lagrange multiplier; 0 for off, and its value is then ``initial_alpha``.
        alpha_threshold: ``tau`` of the Lagrange form. A flat Q already has a gap of about ``A log 2 + log 3N`` (hopper 5.5,
            walker 7.6, AntMaze 8.9, pen 20.0, door 22.8), so it means nothing across tasks unless ``normalize_gap`` is on.
        conservative_weight: Weight ``w`` of the gap, not negative.
        n_action_samples: Actions sampled in each of the three groups (uniform, current policy, policy at the next state).
        soft_q_backup: Whether the target has SAC's entropy term. Not together with ``max_q_backup``.
        max_q_backup: Target is the best of ``n_action_samples`` sampled actions, the minimum over critics first.
        mode_q_backup: Target takes the policy's mode instead of a sample, as with ``conventions="d3rlpy"``: critics of the
            policy that ``predict`` plays. With neither of the two others.
        cql_variant: ``"H"`` (Eq. 4), ``"rho"`` (proposal is the frozen policy, Eq. 3), ``"mu"`` (Eq. 2) or ``"pointwise"``
            (Eq. 1, only to reproduce Table 4).
        cql_temperature: ``T`` of the soft maximum, positive; it divides Q, not the densities.
        cql_clip_diff: Smallest and largest gap of one sample; AntMaze uses ``(-200, inf)``.
        normalize_gap: Subtract the gap of a flat Q, ``T (log 3N + A log 2)``.
        offline_fraction: Share of logged data in the batches of ``fit_online``, or ``"proportional"`` to the sizes.
        conventions: ``"paper"`` or ``"d3rlpy"``, see above.
        precision: ``"bf16"`` computes the hidden layers of the critics' training pass with bfloat16 numbers. Output layers,
            losses, targets, parameters and optimisers stay float32. For perceptrons with rectified linear units, over images
            after plain convolutions, in one process; other critics stay float32 throughout. A processor without such products
            is many times slower with it, and a warning says so.

    Raises:
        ValueError: If a field is out of its range.
    """

    alpha_learning_rate: float = 0.0
    cql_variant: CQLVariant = "H"
    cql_temperature: float = 1.0
    cql_clip_diff: tuple[float, float] = (-math.inf, math.inf)
    normalize_gap: bool = False
    offline_fraction: OfflineFraction = 0.5
    conventions: Literal["paper", "d3rlpy"] = "paper"
    mode_q_backup: bool = False
    precision: Precision = "f32"
    _host_config: ClassVar[type[d3rlpy.algos.CQLConfig]] = d3rlpy.algos.CQLConfig

    def __post_init__(self) -> None:
        _check_shared_fields(self)
        if not (math.isfinite(self.conservative_weight) and self.conservative_weight >= 0.0):
            raise ValueError(f"conservative_weight must be a number >= 0; got {self.conservative_weight}.")
        for name in ("initial_alpha", "initial_temperature"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0.0):
                raise ValueError(f"{name} must be a number > 0, since its logarithm is kept; got {value}.")
        if not (isinstance(self.n_action_samples, int) and self.n_action_samples >= 1):
            raise ValueError(f"n_action_samples must be an integer >= 1; got {self.n_action_samples!r}.")
        if self.cql_variant not in losses.CQL_VARIANTS:
            raise ValueError(f"cql_variant must be one of {losses.CQL_VARIANTS}; got {self.cql_variant!r}.")
        if self.conventions not in ("paper", "d3rlpy"):
            raise ValueError(f'conventions must be "paper" or "d3rlpy"; got {self.conventions!r}.')
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {PRECISIONS}; got {self.precision!r}.")
        if self.soft_q_backup and self.max_q_backup:
            raise ValueError("soft_q_backup and max_q_backup exclude each other in d3rlpy; choose one.")
        if self.mode_q_backup and (self.soft_q_backup or self.max_q_backup):
            other = "max_q_backup" if self.max_q_backup else "soft_q_backup"
            raise ValueError(f"mode_q_backup and {other} exclude each other; set one of them to False.")
        if self.conventions == "d3rlpy" and self.max_q_backup and isinstance(self.q_func_factory, _QUANTILES):
            raise ValueError(
                f"q_func_factory: d3rlpy's max_q_backup cannot compute the target of {type(self.q_func_factory).__name__}, "
                'whose values are quantiles. Set max_q_backup=False, or conventions="paper".'
            )

    @classmethod
    def from_d3rlpy(cls, config: d3rlpy.algos.CQLConfig | dict[str, Any], **changes: Any) -> Self:
        """Take over a config of d3rlpy's own CQL, or its dict, and compute what it computes.

        Args:
            config: ``d3rlpy.algos.CQLConfig``, or what its ``serialize_to_dict`` returns.
            **changes: Fields to set otherwise.

        Returns:
            The config, with ``conventions="d3rlpy"``.

        Raises:
            TypeError: If it is a config of Cal-QL and this class is not, or the other way round.
        """
        if isinstance(config, dict):
            config = cls._host_config.deserialize_from_dict(config)
        if type(config) is not cls._host_config:
            raise TypeError(
                f"config must be a d3rlpy.algos.{cls._host_config.__name__}; got {type(config).__name__}. CQLConfig and "
                "CalQLConfig each take over their own."
            )
        fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
        return cls(**(fields | {"conventions": "d3rlpy"} | changes))

    def create(self, device: DeviceArg = False, enable_ddp: bool = False) -> CQL:
        """Make the algorithm, see d3rlpy.

        Args:
            device: ``"cpu"``, ``"cuda:0"``, an index, or a boolean.
            enable_ddp: Train one model in several processes (``torchrun``).
        """
        return CQL(self, device, enable_ddp)

    @staticmethod
    def get_type() -> str:
        """The name under which d3rlpy finds it in a saved file."""
        return "cql_plugins.cql"


class CQL(OfflineToOnlineMixin, d3rlpy.algos.CQL):
    """Conservative Q-Learning in d3rlpy, see :class:`CQLConfig`."""

    _config: CQLConfig
    _impl: CQLImpl | None

    def inner_create_impl(self, observation_shape: Shape, action_size: int) -> None:
        """Build the networks with d3rlpy's builder, then the update around them.

        Args:
            observation_shape: Shape of one observation, or several.
            action_size: Dimension of the actions.
        """
        super().inner_create_impl(observation_shape, action_size)
        assert isinstance(self._impl, HostCQLImpl)
        warn_of_slow_bf16(self._config.precision, self._impl.device)
        self._impl = self._wrap_impl(self._impl)
        self._watch(self._impl)

    def _wrap_impl(self, built: HostCQLImpl) -> CQLImpl:
        return CQLImpl(built, self._config, self.compiled)


adopt_signatures(CQL, d3rlpy.algos.CQL)


# Discrete actions ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass()
class DiscreteCQLConfig(d3rlpy.algos.DiscreteCQLConfig):
    """Config of Conservative Q-Learning for discrete actions, with d3rlpy's fields and ours.

    The loss is that of double DQN (of QR-DQN with ``QRQFunctionFactory``) plus ``alpha`` times the gap
    ``T logsumexp_a(Q(s, a) / T) - Q(s, a_data)``, summed over critics. d3rlpy takes the gap of the critics' mean; with one
    critic both are the same.

    Args:
        alpha: Weight of the gap, not negative; the paper has 4.0 on 1 % and 1.0 on 10 % of the Atari data, with QR-DQN.
        cql_temperature: ``T`` of the soft maximum, positive.
        cql_clip_diff: Smallest and largest gap of one sample.
        normalize_gap: Subtract the gap of a flat Q, ``T log A``.
        offline_fraction: Share of logged data in the batches of ``fit_online``, or ``"proportional"`` to the sizes.

    Raises:
        ValueError: If a field is out of its range.
    """

    cql_temperature: float = 1.0
    cql_clip_diff: tuple[float, float] = (-math.inf, math.inf)
    normalize_gap: bool = False
    offline_fraction: OfflineFraction = 0.5

    def __post_init__(self) -> None:
        _check_shared_fields(self)
        if not (math.isfinite(self.alpha) and self.alpha >= 0.0):
            raise ValueError(f"alpha must be a number >= 0; got {self.alpha}.")

    def create(self, device: DeviceArg = False, enable_ddp: bool = False) -> DiscreteCQL:
        """Make the algorithm, see d3rlpy.

        Args:
            device: ``"cpu"``, ``"cuda:0"``, an index, or a boolean.
            enable_ddp: Train one model in several processes (``torchrun``).
        """
        return DiscreteCQL(self, device, enable_ddp)

    @staticmethod
    def get_type() -> str:
        """The name under which d3rlpy finds it in a saved file."""
        return "cql_plugins.discrete_cql"


class DiscreteCQL(OfflineToOnlineMixin, d3rlpy.algos.DiscreteCQL):
    """Conservative Q-Learning for discrete actions in d3rlpy, see :class:`DiscreteCQLConfig`."""

    _config: DiscreteCQLConfig
    _impl: DiscreteCQLImpl | None

    def inner_create_impl(self, observation_shape: Shape, action_size: int) -> None:
        """Build the networks with d3rlpy's builder, then the update around them.

        Args:
            observation_shape: Shape of one observation, or several.
            action_size: Number of actions.
        """
        super().inner_create_impl(observation_shape, action_size)
        assert isinstance(self._impl, HostDiscreteCQLImpl)
        self._impl = self._wrap_impl(self._impl)
        self._watch(self._impl)

    def _wrap_impl(self, built: HostDiscreteCQLImpl) -> DiscreteCQLImpl:
        return DiscreteCQLImpl(built, self._config, self.compiled)


adopt_signatures(DiscreteCQL, d3rlpy.algos.DiscreteCQL)


def _check_shared_fields(config: CQLConfig | DiscreteCQLConfig) -> None:
    """Refuse fields out of range, and bring those that JSON has as lists back to tuples."""
    if not (math.isfinite(config.cql_temperature) and config.cql_temperature > 0.0):
        raise ValueError(f"cql_temperature must be a number > 0; got {config.cql_temperature}.")
    clip = tuple(config.cql_clip_diff)
    if len(clip) != 2 or not clip[0] < clip[1]:
        raise ValueError(f"cql_clip_diff must be (smallest, largest) with smallest < largest; got {config.cql_clip_diff}.")
    config.cql_clip_diff = (float(clip[0]), float(clip[1]))
    fraction = config.offline_fraction
    if fraction != "proportional" and not (isinstance(fraction, (int, float)) and 0.0 <= fraction <= 1.0):
        raise ValueError(f'offline_fraction must be in [0, 1] or "proportional"; got {fraction!r}.')


register_once(CQLConfig)
register_once(DiscreteCQLConfig)
