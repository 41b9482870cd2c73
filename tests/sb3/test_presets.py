"""The presets against the table they come from, and as arguments."""

from __future__ import annotations

import math
from typing import Any

import pytest

from cql_plugins.sb3 import CQL, CalQL, DiscreteCQL
from cql_plugins.sb3.presets import PRESETS, print_presets
from tests.sb3.conftest import of_contrib

CQLQRDQN, CQLTQC, CalQLQRDQN, CalQLTQC = of_contrib("CQLQRDQN", "CQLTQC", "CalQLQRDQN", "CalQLTQC")

# Weight, threshold, max backup, smallest gap, actor's rate, networks of actor and critic, reward, normalised observations.
TABLE: dict[str, tuple[Any, ...]] = {
    "locomotion": (10.0, None, False, -math.inf, 3e-5, [256] * 3, [256] * 3, (1, 0), True),
    "locomotion-medium-expert": (5.0, None, False, -math.inf, 3e-5, [256] * 3, [256] * 3, (1, 0), True),
    "antmaze": (5.0, 0.8, True, -200.0, 1e-4, [256] * 2, [256] * 4, (10, -5), False),
    "adroit-binary": (1.0, None, True, -math.inf, 1e-4, [512] * 2, [512] * 3, (10, 5), False),
    "adroit-human": (1.0, None, False, -math.inf, 1e-4, [256] * 3, [256] * 3, (1, 0), True),
    "kitchen": (5.0, None, True, -math.inf, 1e-4, [512] * 3, [512] * 3, (1, -4), False),
}


@pytest.mark.parametrize("name", TABLE)
@pytest.mark.parametrize("algorithm", [CQL, CalQL, CQLTQC, CalQLTQC])
def test_continuous(name: str, algorithm: Any, host: Any) -> None:
    preset = PRESETS[name]
    model = algorithm("MlpPolicy", host.corridors(), device="cpu", **preset.arguments(algorithm))
    found = (
        model.cql_alpha,
        model.cql_lagrange_threshold,
        # Cal-QL's own default is on; off is said only where the table says so.
        model.max_q_backup if "max_q_backup" in preset.values or not issubclass(algorithm, CalQL) else False,
        model.cql_clip_diff[0],
        model.actor_lr_schedule(1.0),
        *(model.policy_kwargs["net_arch"][key] for key in ("pi", "qf")),
        (preset.reward_scale, preset.reward_shift),
        preset.normalize_observations,
    )
    if algorithm is not CalQLTQC or "max_q_backup" in preset.values:
        assert found == TABLE[name]
    assert (model.lr_schedule(1.0), model.gamma, model.tau, model.batch_size, model.cql_n_actions) == (
        3e-4,
        0.99,
        0.005,
        256,
        10,
    )
    if hasattr(model, "return_tail"):
        # A truncated sum of negative rewards is no lower bound.
        assert model.return_tail == {"antmaze": "sparse", "adroit-binary": "sparse", "kitchen": "bootstrap"}.get(name, "zero")


@pytest.mark.parametrize(("name", "weight"), [("atari-1", 4.0), ("atari-10", 1.0)])
@pytest.mark.parametrize("algorithm", [CQLQRDQN, CalQLQRDQN])
def test_atari(name: str, weight: float, algorithm: Any, host: Any) -> None:
    env = host.corridors(form="image", discrete=True)
    model = algorithm("CnnPolicy", env, device="cpu", buffer_size=10, **PRESETS[name].arguments(algorithm))
    assert (model.cql_alpha, model.lr_schedule(1.0), model.batch_size, model.n_quantiles) == (weight, 5e-5, 32, 200)
    assert model._offline_interval == 2000
    assert model.policy.optimizer.defaults["eps"] == 0.01 / 32
    assert type(model.policy.optimizer).__name__ == "Adam"
    assert PRESETS[name].reward_clip == 1.0


def test_changes_and_the_wrong_class() -> None:
    preset = PRESETS["antmaze"]
    changed = preset.arguments(CQL, cql_alpha=7.0, policy_kwargs={"n_critics": 3})
    assert changed["cql_alpha"] == 7.0
    assert changed["policy_kwargs"] == {"net_arch": {"pi": [256] * 2, "qf": [256] * 4}, "n_critics": 3}
    assert "return_tail" not in changed
    assert "n_critics" not in preset.arguments(CQL)["policy_kwargs"], "the preset itself stays as it is"
    with pytest.raises(ValueError, match="is not for DiscreteCQL, which has no n_quantiles"):
        PRESETS["atari-1"].arguments(DiscreteCQL)
    with pytest.raises(ValueError, match="is not for DiscreteCQL, which has no actor_learning_rate"):
        preset.arguments(DiscreteCQL)
    with pytest.raises(TypeError):
        preset.values["cql_alpha"] = 1.0  # type: ignore[index]


def test_printed(capsys: pytest.CaptureFixture[str]) -> None:
    print_presets()
    printed = capsys.readouterr().out
    assert all(f"{name}: " in printed for name in PRESETS)
    assert "10 * r + -5" in printed
    assert "cql_lagrange_threshold           0.8" in printed
