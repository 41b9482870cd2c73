"""Policies as files that run elsewhere: what the file answers is what `predict` answers, and nothing of the model changes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import DQN, PPO, SAC, TD3
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack, VecNormalize, VecTransposeImage

import cql_plugins.sb3 as room
from cql_plugins._checkpoints import encode, random_states
from cql_plugins.sb3 import CQL, CalQL, DiscreteCalQL, DiscreteCQL, export_policy, load_weights, save_weights
from tests.sb3.conftest import of_contrib

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.load` is (deprecated|not supported)")

CQLQRDQN, CalQLQRDQN, CQLTQC, CalQLTQC = of_contrib("CQLQRDQN", "CalQLQRDQN", "CQLTQC", "CalQLTQC")
DISCRETE = (DQN, CQLQRDQN, CalQLQRDQN)
ACTIONS = spaces.Box(np.array([-1, 10], np.float32), np.array([3, 11], np.float32))
BOTH = [".onnx", ".pt"]


@pytest.fixture(params=BOTH)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Where to, in each format."""
    return ready(tmp_path / f"policy{request.param}")


def ready(path: Path) -> Path:
    """Skip without the packages of a format."""
    if path.suffix == ".onnx":
        for package in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(package)
    return path


def skip_what_torch_cannot(suffix: str, space: Any) -> None:
    if suffix == ".onnx" and isinstance(space, spaces.Dict) and sys.version_info >= (3, 14) and th.__version__[:4] == "2.9.":
        pytest.skip("torch 2.9 cannot export several observations with Python 3.14")


def build(host: Any, cls: Any, form: str = "vector", normalized: bool = False, **changes: Any) -> Any:
    """A model with random networks, and with statistics that change every observation."""
    env = host.corridors(form=form, discrete=issubclass(cls, DISCRETE))
    if normalized:
        keys = ["state"] if form == "dict" else None
        env = VecNormalize(env, norm_obs_keys=keys, norm_reward=False, clip_obs=2.0, epsilon=0.1)
        rms: Any = env.obs_rms["state"] if form == "dict" else env.obs_rms
        rms.mean, rms.var = np.array([1.5, -0.7]), np.array([4.0, 0.3])
    if issubclass(cls, PPO):
        return cls("MlpPolicy", env, n_steps=8, batch_size=8, device="cpu", seed=0, policy_kwargs={"net_arch": [8]})
    return host.build(cls, env, form, **changes)


def build_for(host: Any, cls: Any, observation_space: Any, action_space: Any = ACTIONS, **changes: Any) -> Any:
    """A model for any spaces."""
    policy = "MultiInputPolicy" if isinstance(observation_space, spaces.Dict) else "MlpPolicy"
    return host.build(cls, DummyVecEnv([lambda: host.Spaces(observation_space, action_space)]), policy=policy, **changes)


def look(space: Any, n: int) -> Any:
    """A batch of observations; numbers without bounds are drawn around zero."""
    if isinstance(space, spaces.Dict):
        return {name: look(one, n) for name, one in space.spaces.items()}
    space.seed(n)
    rows = np.stack([space.sample() for _ in range(n)])
    return np.random.default_rng(n).normal(0, 3, rows.shape).astype(space.dtype) if rows.dtype.kind == "f" else rows


def ask(path: Path, observations: Any) -> np.ndarray:
    """Let the file act."""
    if path.suffix == ".onnx":
        runtime = pytest.importorskip("onnxruntime")
        session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        inputs = observations if isinstance(observations, dict) else {"observation": observations}
        return np.asarray(session.run(["action"], inputs)[0])
    if isinstance(observations, dict):  # in any order
        tensors: Any = {name: th.as_tensor(one) for name, one in reversed(observations.items())}
    else:
        tensors = th.as_tensor(observations)
    return np.asarray(th.jit.load(str(path))(tensors))


def answer(model: BaseAlgorithm, observations: Any, normalizer: VecNormalize | None = None) -> np.ndarray:
    """What `predict` makes of raw observations."""
    return model.predict(normalizer.normalize_obs(observations) if normalizer else observations, deterministic=True)[0]


def same(first: np.ndarray, second: np.ndarray) -> bool:
    assert first.shape == second.shape
    assert first.dtype == second.dtype
    return bool(np.abs(first - second).max() <= 1e-5)


def change(model: BaseAlgorithm, seed: int = 1) -> None:
    """Make another policy of it."""
    generator = th.Generator().manual_seed(seed)
    with th.no_grad():
        for parameter in model.policy.parameters():
            parameter.add_(th.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize(
    ("cls", "form", "normalized", "changes", "suffix"),
    [
        *((CQL, "vector", True, {}, suffix) for suffix in BOTH),
        *((CalQL, "dict", True, {}, suffix) for suffix in BOTH),
        *((CalQL, "image", False, {"use_sde": True}, suffix) for suffix in BOTH),
        *((DiscreteCQL, "image", False, {}, suffix) for suffix in BOTH),
        *((CQLQRDQN, "dict", True, {}, suffix) for suffix in BOTH),
        (CQLTQC, "vector", False, {}, ".onnx"),
        (CQLTQC, "dict", True, {"policy_kwargs": {"share_features_extractor": True}}, ".pt"),
        (CalQLTQC, "image", False, {}, ".pt"),
        (CalQLQRDQN, "vector", True, {}, ".pt"),
        (DiscreteCalQL, "vector", False, {}, ".pt"),
        (SAC, "vector", True, {"use_sde": True}, ".pt"),
        (TD3, "dict", False, {}, ".pt"),
        (DQN, "dict", True, {}, ".pt"),
        (PPO, "vector", True, {}, ".pt"),
    ],
)
def test_answers_as_predict_does(
    host: Any, cls: Any, form: str, normalized: bool, changes: Any, suffix: str, tmp_path: Path
) -> None:
    path = ready(tmp_path / f"policy{suffix}")
    model = build(host, cls, form, normalized, **changes)
    skip_what_torch_cannot(suffix, model.observation_space)
    normalizer = model.get_vec_normalize_env()
    export_policy(model, path)
    batches = [look(model.observation_space, n) for n in (1, 7, 40)]
    for observations in batches:
        assert same(ask(path, observations), answer(model, observations, normalizer))
    if normalized:
        assert not same(ask(path, batches[-1]), answer(model, batches[-1]))
    if isinstance(model.action_space, spaces.Box):
        assert np.ptp(ask(path, batches[-1])) > 1e-3  # not one thing to everybody
    change(model)
    assert not same(ask(path, batches[-1]), answer(model, batches[-1], normalizer))
    assert list(tmp_path.iterdir()) == [path]


OBSERVED = {
    "numbers": spaces.Box(-1, 1, (2, 3), np.float64),
    "counts": spaces.Box(0, 9, (4,), np.int32),
    "room": spaces.Discrete(4),
    "of/several": spaces.MultiDiscrete([3, 2, 4]),
    "switches": spaces.MultiBinary([2, 2]),
}


class TestSpaces:
    @pytest.mark.parametrize(
        ("space", "suffix"),
        [
            *((spaces.Dict(OBSERVED), suffix) for suffix in BOTH),
            *((space, ".pt") for space in OBSERVED.values()),
            (OBSERVED["numbers"], ".onnx"),
        ],
    )
    def test_observations(self, host: Any, space: Any, suffix: str, tmp_path: Path) -> None:
        skip_what_torch_cannot(suffix, space)
        path = ready(tmp_path / f"policy{suffix}")
        model = build_for(host, CQL, space)
        export_policy(model, path)
        for observations in (look(space, 1), look(space, 7)):
            assert same(ask(path, observations), answer(model, observations))
        change(model)
        assert not same(ask(path, observations), answer(model, observations))

    @pytest.mark.parametrize(
        ("cls", "space"),
        [
            (CQL, spaces.Box(np.array([[-5, 0, 1]] * 2), np.array([[5, 0.5, 9]] * 2), dtype=np.float64)),
            (TD3, spaces.Box(-9, 3, (2,), np.int32)),
            (PPO, spaces.Box(-0.1, 0.05, (2,))),  # not squashed, but cut off
            (PPO, spaces.Discrete(3)),
            (PPO, spaces.MultiDiscrete([3, 4])),
            (PPO, spaces.MultiBinary(3)),
        ],
        ids=lambda one: getattr(one, "__name__", str(one)),
    )
    def test_actions(self, host: Any, cls: Any, space: Any, tmp_path: Path) -> None:
        small = {"policy_kwargs": {"net_arch": [8]}, "device": "cpu", "seed": 0}
        env = host.Spaces(spaces.Box(-1, 1, (3,)), space)
        model = cls("MlpPolicy", env, **small, **({"n_steps": 8, "batch_size": 8} if cls is PPO else {"buffer_size": 10}))
        change(model)  # SB3 makes PPO's first actions small.
        export_policy(model, tmp_path / "policy.pt")
        observations = look(model.observation_space, 7)
        answers = answer(model, observations)
        assert same(ask(tmp_path / "policy.pt", observations), answers)
        if cls is PPO and isinstance(space, spaces.Box):
            assert np.isin(answers, [space.low[0], space.high[0]]).any()
        change(model, seed=2)
        assert not same(ask(tmp_path / "policy.pt", observations), answer(model, observations))


class TestImages:
    def test_channels_last(self, host: Any, place: Path) -> None:
        model = build_for(host, CQL, spaces.Box(0, 255, (36, 38, 3), np.uint8))
        images = look(model.observation_space, 7)
        assert images.shape[1:] == (3, 36, 38)
        export_policy(model, place, channels_last=True)
        moved = images.transpose(0, 2, 3, 1)
        assert same(ask(place, moved), answer(model, images))
        assert same(answer(model, moved), answer(model, images))
        assert not same(ask(place, moved[:, ::-1].copy()), answer(model, images))

    def test_of_a_dict(self, host: Any, tmp_path: Path) -> None:
        model = build(host, CQL, "dict", normalized=True)
        observations = look(model.observation_space, 7)
        expected = answer(model, observations, model.get_vec_normalize_env())
        export_policy(model, tmp_path / "policy.pt", channels_last=True)
        moved = observations | {"camera": observations["camera"].transpose(0, 2, 3, 1)}
        assert same(ask(tmp_path / "policy.pt", moved), expected)

    def test_normalized(self, host: Any, place: Path) -> None:
        """What comes in are bytes then; the policy's own space has floats."""
        env = VecNormalize(VecTransposeImage(host.corridors(form="image")), norm_reward=False)
        rms: Any = env.obs_rms
        rms.mean, rms.var = rms.mean + 90.0, rms.var + 5e3
        model = host.build(CQL, env, "image", policy_kwargs={"normalize_images": False})
        images = look(env.venv.observation_space, 7)
        export_policy(model, place, channels_last=True)
        assert images.dtype == np.uint8
        moved = images.transpose(0, 2, 3, 1)
        assert same(ask(place, moved), answer(model, images, env))
        assert not same(ask(place, moved), answer(model, images))

    def test_normalized_with_channels_last(self, host: Any, tmp_path: Path) -> None:
        """SB3 leaves the channels there, and so does the file."""
        env = VecNormalize(host.corridors(form="image"), norm_reward=False)
        model = host.build(CQL, env, policy="MlpPolicy")
        images = look(env.venv.observation_space, 7)
        assert images.shape[-1] == 1
        export_policy(model, tmp_path / "policy.pt")
        assert same(ask(tmp_path / "policy.pt", images), answer(model, images, env))
        for unsuited in (model, build(host, CQL)):
            with pytest.raises(ValueError, match="channels_last=True is for images"):
                export_policy(unsuited, tmp_path / "policy.pt", channels_last=True)


class TestNormalization:
    def test_given(self, host: Any, tmp_path: Path) -> None:
        path = tmp_path / "policy.pt"
        model, normalizer = build(host, CQL), build(host, CQL, normalized=True).get_vec_normalize_env()
        observations = look(model.observation_space, 7)
        export_policy(model, path, vec_normalize=normalizer)
        assert same(ask(path, observations), answer(model, observations, normalizer))
        normalizer.norm_obs = False
        export_policy(model, path, vec_normalize=normalizer)
        assert same(ask(path, observations), answer(model, observations))

    def test_left_out(self, host: Any, tmp_path: Path) -> None:
        model = build(host, CQL, normalized=True)
        observations = look(model.observation_space, 7)
        export_policy(model, tmp_path / "policy.pt", vec_normalize=False)
        assert same(ask(tmp_path / "policy.pt", observations), answer(model, observations))
        assert not same(ask(tmp_path / "policy.pt", observations), answer(model, observations, model.get_vec_normalize_env()))

    @pytest.mark.parametrize(("clip", "suffix"), [(10, ".pt"), (np.inf, ".pt"), (np.inf, ".onnx")])
    def test_far_from_zero(self, host: Any, clip: float, suffix: str, tmp_path: Path) -> None:
        """In float32 the mean alone would be off by 4e-3 of a standard deviation."""
        place = ready(tmp_path / f"policy{suffix}")
        model = build(host, CQL, normalized=True)
        normalizer = model.get_vec_normalize_env()
        normalizer.obs_rms.mean, normalizer.clip_obs = np.array([123_456.7891, -98_765.4321]), clip
        observations = look(model.observation_space, 7) + normalizer.obs_rms.mean.astype(np.float32)
        export_policy(model, place)
        assert same(ask(place, observations), answer(model, observations, normalizer))
        normalizer.obs_rms.mean = normalizer.obs_rms.mean.astype(np.float32)
        assert not same(ask(place, observations), answer(model, observations, normalizer))

    @pytest.mark.parametrize("how", ["offline", "online", "weights"])
    def test_missing(self, host: Any, how: str, tmp_path: Path) -> None:
        model = build(host, CQL, normalized=True)
        if how == "online":
            model.learn(3)
        else:
            model.learn_offline(host.collect(), 1)
        if how == "weights":
            pytest.importorskip("safetensors")
            save_weights(model, tmp_path / "model")
            with pytest.warns(UserWarning, match="trained on normalised"):
                loaded = load_weights(tmp_path / "model", device="cpu")
        else:
            model.save(tmp_path / "model.zip")
            loaded = type(model).load(tmp_path / "model.zip", device="cpu")
        with pytest.raises(ValueError, match=r"trained on observations normalised.*vec_normalize=VecNormalize.load"):
            export_policy(loaded, tmp_path / "policy.pt")
        assert not (tmp_path / "policy.pt").exists()
        export_policy(loaded, tmp_path / "policy.pt", vec_normalize=model.get_vec_normalize_env())
        export_policy(loaded, tmp_path / "policy.pt", vec_normalize=False)

    @pytest.mark.parametrize("normalize", [False, True])
    def test_not_missing(self, host: Any, normalize: bool, tmp_path: Path) -> None:
        env = VecNormalize(host.corridors(), norm_obs=False) if normalize else host.corridors()
        model = host.build(CQL, env)
        model.learn_offline(host.collect(), 1).learn(3)
        model.save(tmp_path / "model.zip")
        export_policy(CQL.load(tmp_path / "model.zip", device="cpu"), tmp_path / "policy.pt")

    def test_that_does_not_fit(self, host: Any, tmp_path: Path) -> None:
        path = tmp_path / "policy.pt"
        of_frames = host.build(CQL, VecFrameStack(VecNormalize(host.corridors()), 2))
        with pytest.raises(ValueError, match=r"do not fit what the policy sees: 'observation' has shape \(2,\).*\(4,\)"):
            export_policy(of_frames, path)
        of_dict = build(host, CQL, "dict", normalized=True).get_vec_normalize_env()
        with pytest.raises(ValueError, match="do not fit what the policy sees: 'state'"):
            export_policy(build(host, CQL), path, vec_normalize=of_dict)
        with pytest.raises(TypeError, match="must be a VecNormalize, False or None; got str"):
            export_policy(build(host, CQL), path, vec_normalize="stats.pkl")  # type: ignore[arg-type]
        assert list(tmp_path.iterdir()) == []


class Moody(BaseFeaturesExtractor):
    """Something that behaves otherwise in training."""

    def __init__(self, observation_space: spaces.Space[Any]) -> None:
        super().__init__(observation_space, 8)
        self.layers = th.nn.Sequential(th.nn.Linear(2, 8), th.nn.BatchNorm1d(8), th.nn.Dropout(0.5))

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return self.layers(observations)


def test_nothing_of_the_model_changes(host: Any, place: Path) -> None:
    options = {"use_sde": True, "policy_kwargs": {"features_extractor_class": Moody}}
    model, untouched = (build(host, CalQL, normalized=True, **options) for _ in range(2))
    data = host.collect()
    for one in (model, untouched):
        one.learn_offline(data, 2)
        one.policy.set_training_mode(True)
        one.critic_target.eval()

    def everything() -> dict[str, Any]:
        distribution = model.actor.action_dist
        return {
            "tensors": host.state(model),
            "training": {name: module.training for name, module in model.policy.named_modules()},
            "gradients": {name: p.requires_grad for name, p in model.policy.named_parameters()},
            "objects": {name: id(p) for name, p in model.policy.named_parameters()},
            "noise": {name: id(one) for name, one in vars(distribution).items()},
            "checks": th.distributions.Distribution._validate_args,
            "random": encode({key: one for key, one in random_states().items() if key in ("python", "numpy")}, {}, ""),
            "torch": th.get_rng_state().tolist(),
            "space": [str(space.np_random.bit_generator.state) for space in (model.observation_space, model.action_space)],
            "rms": model.get_vec_normalize_env().obs_rms.mean.tolist(),
        }

    th.distributions.Distribution.set_default_validate_args(__debug__)  # torch's default
    before = everything()
    export_policy(model, place)
    after = everything()
    assert host.differing(before.pop("tensors"), after.pop("tensors")) == set()
    assert before == after
    observations = look(model.observation_space, 7)
    assert same(ask(place, observations), answer(model, observations, model.get_vec_normalize_env()))
    assert same(ask(place, observations), ask(place, observations))  # no dropout
    model.policy.set_training_mode(True)
    for one in (model, untouched):
        one.learn_offline(data, 2)
    assert host.differing(host.state(model), host.state(untouched)) == set()
    untouched.learn_offline(data, 1)
    assert host.differing(host.state(model), host.state(untouched))


class Decided(CQL):
    """Predicts in a way of its own."""

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        return np.zeros(1), None


class TestRefused:
    @pytest.mark.parametrize("name", ["policy.h5", "policy", "policy.zip"])
    def test_endings(self, host: Any, name: str, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=rf"must end in .onnx \(ONNX\) or .pt \(TorchScript\); got .*{name}"):
            export_policy(build(host, CQL), tmp_path / name)

    def test_what_is_no_model(self, host: Any, tmp_path: Path) -> None:
        with pytest.raises(TypeError, match=r"must be a Stable-Baselines3 algorithm.*got SACPolicy"):
            export_policy(build(host, CQL).policy, tmp_path / "policy.pt")

    def test_models_that_predict_otherwise(self, host: Any, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"Decided has a predict of its own"):
            export_policy(build(host, Decided), tmp_path / "policy.pt")

    @pytest.mark.parametrize("name", ["RecurrentPPO", "MaskablePPO"])
    def test_memory_and_masks(self, host: Any, name: str, tmp_path: Path) -> None:
        contrib = pytest.importorskip("sb3_contrib")
        policy = "MlpLstmPolicy" if name == "RecurrentPPO" else "MlpPolicy"
        model = getattr(contrib, name)(policy, host.Corridor(discrete=True), n_steps=8, batch_size=8, device="cpu")
        with pytest.raises(ValueError, match=r"Policy has a predict of its own \(a recurrent policy, action masks"):
            export_policy(model, tmp_path / "policy.pt")

    def test_spaces(self, host: Any, tmp_path: Path) -> None:
        model = build(host, CQL)
        model.observation_space = spaces.Tuple([spaces.Discrete(2)])
        with pytest.raises(ValueError, match=r"observation space cannot be exported: expected Box.*got Tuple"):
            export_policy(model, tmp_path / "policy.pt")
        named = build_for(host, CQL, spaces.Dict({"action": spaces.Discrete(2)}))
        with pytest.raises(ValueError, match="key 'action', which is the name of the output"):
            export_policy(named, tmp_path / "policy.pt")

    def test_onnx_without_its_packages(self, host: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setitem(sys.modules, "onnxscript", None)
        with pytest.raises(ImportError, match=r'pip install "cql-plugins\[onnx\]"'):
            export_policy(build(host, CQL), tmp_path / "policy.onnx")
        assert list(tmp_path.iterdir()) == []


class TestFiles:
    def test_whole_or_not_at_all(self, host: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        path = tmp_path / "policy.pt"
        path.write_bytes(b"the last good one")

        def full(*_: Any) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("os.fsync", full)
        with pytest.raises(OSError, match=r"could not write .*policy\.pt; the older one there is untouched"):
            export_policy(build(host, CQL), path)
        assert path.read_bytes() == b"the last good one"
        assert list(tmp_path.iterdir()) == [path]

    def test_what_they_say_of_the_model(self, host: Any, place: Path) -> None:
        model = build(host, CQL, normalized=True, policy_kwargs={"net_arch": {"pi": [8], "qf": [600, 600]}})
        export_policy(model, place)
        # The acting network alone, without the critics.
        assert sum(p.numel() * p.element_size() for p in model.critic.parameters()) > 2_000_000
        assert place.stat().st_size < 100_000
        if place.suffix == ".onnx":
            runtime = pytest.importorskip("onnxruntime")
            session = runtime.InferenceSession(str(place), providers=["CPUExecutionProvider"])
            said = session.get_modelmeta().custom_metadata_map
            (taken,), (given,) = session.get_inputs(), session.get_outputs()
            assert (taken.name, taken.type, taken.shape[1:]) == ("observation", "tensor(float)", [2])
            assert (given.name, given.type, given.shape[1:]) == ("action", "tensor(float)", [1])
            assert isinstance(taken.shape[0], str)
            # What torch notes of each step: the folders of this machine and lines of code.
            for note in (str(Path(room.__file__).parent), str(Path(th.__file__).parent), "stack_trace", "line "):
                assert note.encode() not in place.read_bytes()
        else:
            extra = {"metadata.json": ""}
            th.jit.load(str(place), _extra_files=extra)
            said = json.loads(extra["metadata.json"])
        assert said["algorithm"] == "CQL"
        assert said["observation_space"] == "Box(-10.0, 10.0, (2,), float32)"
        assert said["action_space"] == "Box(-1.0, 3.0, (1,), float32)"
        assert json.loads(said["normalized_inside"]) == ["observation"]
        assert {"cql_plugins", "stable_baselines3", "torch"} < said.keys()
