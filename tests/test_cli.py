"""The command line: what it prints, what it writes, what it refuses, and its exit codes."""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec

from cql_plugins.adapters import OfflineDataset, from_d4rl, from_minari, from_npz, to_minari, to_npz
from cql_plugins.adapters._findings import find
from cql_plugins.adapters._steps import StepColumn

pytest.importorskip("typer")
pytest.importorskip("rich")
import typer.testing

from cql_plugins import _commands
from cql_plugins._commands import app

CODE = {"fine": 0, "refused": 1, "usage": 2, "strict": 3}
MINARI_ID = "made/up-v0"


def run(*args: str | Path, expect: str = "fine") -> Any:
    """Run the command in this process; nothing but an exit may leave it."""
    result = typer.testing.CliRunner().invoke(app, [str(arg) for arg in args])
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    assert "Traceback" not in result.output
    assert result.exit_code == CODE[expect], result.output
    return result


def flat(text: str) -> str:
    """Undo the wrapping of lines, and take away the frames."""
    return " ".join(re.sub("[│╭╮╰╯─]", " ", text).split())


def warned(*args: str | Path) -> dict[str, str]:
    """Inspect; code and message of each warning."""
    found = json.loads(run("inspect", *args, "--json").stdout)["warnings"]
    assert len({one["code"] for one in found}) == len(found)
    return {one["code"]: one["message"] for one in found}


# Data -----------------------------------------------------------------------------------------------------------------

Rows = dict[str, Any]


@pytest.fixture
def rows() -> Rows:
    """Healthy data with one row per step: eight episodes of five to eight steps, every other one terminated."""
    rng = np.random.default_rng(3)
    lengths = np.array([5, 6, 7, 8, 5, 6, 7, 8])
    n_steps, last = int(lengths.sum()), np.cumsum(lengths) - 1
    observed = [rng.normal(size=(length + 1, 3)).astype(np.float32) for length in lengths]
    ends = np.zeros(n_steps, dtype=bool)
    ends[last] = True
    terminal = np.zeros(n_steps, dtype=bool)
    terminal[last[::2]] = True
    return {
        "observations": np.concatenate([one[:-1] for one in observed]),
        "actions": rng.uniform(-0.9, 0.9, size=(n_steps, 2)).astype(np.float32),
        "rewards": rng.uniform(0.1, 1.0, size=n_steps),
        "terminations": terminal,
        "truncations": ends & ~terminal,
        "next_observations": np.concatenate([one[1:] for one in observed]),
    }


def write_npz(path: Path, rows: Rows) -> Path:
    np.savez(path, **rows)
    return path


def write_d4rl(path: Path, rows: Rows) -> Path:
    h5py = pytest.importorskip("h5py")
    names = {"terminations": "terminals", "truncations": "timeouts"}
    with h5py.File(path, "w") as file:
        for key, value in rows.items():
            file.create_dataset(names.get(key, key), data=value, compression="gzip")
    return path


def write_minari(rows: Rows, *, action_space: spaces.Space[Any] | None = None, **options: Any) -> str:
    """With Minari alone, not with our writer, which is tested with it elsewhere."""
    minari = pytest.importorskip("minari")
    pytest.importorskip("h5py")
    from minari.data_collector.episode_buffer import EpisodeBuffer

    stops = np.flatnonzero(rows["terminations"] | rows["truncations"]) + 1
    buffers = []
    for start, stop in zip([0, *stops[:-1]], stops, strict=True):
        part = {key: value[start:stop] for key, value in rows.items() if key != "next_observations"}
        part["observations"] = np.concatenate([part["observations"], rows["next_observations"][stop - 1 : stop]])
        buffers.append(EpisodeBuffer(**part))
    minari.create_dataset_from_buffers(
        MINARI_ID,
        buffers,
        observation_space=spaces.Box(-np.inf, np.inf, (3,), np.float32),
        action_space=action_space or spaces.Box(-1.0, 1.0, (2,), np.float32),
        **options,
    )
    return MINARI_ID


Write = Callable[[str, Rows], str]


@pytest.fixture
def write(tmp_path: Path, minari_home: Path) -> Write:
    """Write rows in a format; what to call the command with."""

    def _write(kind: str, rows: Rows) -> str:
        if kind in ("id", "folder"):
            write_minari(rows)
            return MINARI_ID if kind == "id" else str(minari_home / MINARI_ID)
        writer = write_npz if kind == "npz" else write_d4rl
        return str(writer(tmp_path / f"data.{kind}", rows))

    return _write


KINDS = {"npz": "npz", "hdf5": "d4rl", "folder": "minari", "id": "minari"}


# Inspect --------------------------------------------------------------------------------------------------------------


class TestInspect:
    @pytest.mark.parametrize("kind", KINDS)
    def test_healthy_data_of_every_kind(self, rows: Rows, write: Write, kind: str) -> None:
        source = write(kind, rows)
        shown = run("inspect", source, "--strict").stdout
        for expected in ("8 / 52", "50.0 % / 50.0 % / 0.0 %", "no warnings", "return-to-go, gamma 0.99, 0 after a cut"):
            assert expected in shown
        assert "warning" not in shown.replace("no warnings", "")

    @pytest.mark.parametrize("kind", KINDS)
    def test_figures_equal_those_of_numpy(self, rows: Rows, write: Write, kind: str) -> None:
        rows["actions"][:4, 1], rows["actions"][4, 0] = 1.0, -0.985
        rows["rewards"][7] -= 3
        found = json.loads(run("inspect", write(kind, rows), "--json", "--gamma", "0.9").stdout)
        stops = np.flatnonzero(rows["terminations"] | rows["truncations"]) + 1
        starts = np.array([0, *stops[:-1]])
        returns = np.array([rows["rewards"][a:b].sum() for a, b in zip(starts, stops, strict=True)])
        expected = {
            "kind": KINDS[kind],
            "n_episodes": 8,
            "n_transitions": 52,
            "share_terminated": 0.5,
            "share_truncated": 0.5,
            "share_unflagged": 0.0,
            "scores": None,
            "reward_range": pytest.approx([rows["rewards"].min(), rows["rewards"].max()]),
            "share_actions_at_bounds": pytest.approx(4 / 104),
            "action_counts": None,
            "constant_columns": [],
            "action_saturation": {"lower": pytest.approx([1 / 52, 0]), "upper": pytest.approx([0, 4 / 52])},
            "observation_space": "Box(-inf .. inf, (3,), float32)",
            "action_space": "Box(-1 .. 1, (2,), float32)",
            "gamma": 0.9,
        }
        assert {key: found[key] for key in expected} == expected
        for name, values in (("lengths", stops - starts), ("returns", returns)):
            assert found[name]["mean"] == pytest.approx(values.mean())
            assert found[name]["lower_quartile"] == pytest.approx(np.quantile(values, 0.25))
            assert found[name]["maximum"] == pytest.approx(values.max())
        to_go, running = np.zeros(52), 0.0
        for row in range(51, -1, -1):
            running = rows["rewards"][row] + 0.9 * (0.0 if row + 1 in stops else running)
            to_go[row] = running
        assert found["returns_to_go"]["median"] == pytest.approx(np.median(to_go), rel=1e-6)
        assert found["returns_to_go"]["minimum"] == pytest.approx(to_go.min(), rel=1e-6)
        assert [one["code"] for one in found["warnings"]] == ["return-tail"]

    def test_scores(self, rows: Rows, tmp_path: Path) -> None:
        found = json.loads(run("inspect", write_npz(tmp_path / "hopper-medium-v2.npz", rows), "--json").stdout)
        mean = found["returns"]["mean"]
        assert found["scores"]["mean"] == pytest.approx(100 * (mean + 20.272305) / (3234.3 + 20.272305))

    def test_json_is_all_there_is(self, rows: Rows, write: Write) -> None:
        rows["actions"] *= 3
        result = run("inspect", write("npz", rows), "--json", "--strict", expect="strict")
        assert json.loads(result.stdout)["warnings"]
        assert result.stderr == ""

    def test_minari_s_own_file_and_folders(self, rows: Rows, write: Write) -> None:
        folder = Path(write("folder", rows))
        for source in (folder, folder / "data", folder / "data" / "main_data.hdf5"):
            assert json.loads(run("inspect", source, "--json").stdout)["n_transitions"] == 52

    @pytest.mark.parametrize("data_format", ["arrow", "parquet"])
    def test_minari_s_other_storages(self, rows: Rows, data_format: str) -> None:
        pytest.importorskip("pyarrow")
        storages = pytest.importorskip("minari.dataset._storages")
        if data_format not in storages.get_storage_keys():
            pytest.skip(f"this Minari has no storage {data_format}")
        assert json.loads(run("inspect", write_minari(rows, data_format=data_format), "--json").stdout)["n_episodes"] == 8

    def test_kind_by_content_where_the_name_does_not_say(self, rows: Rows, write: Write, tmp_path: Path) -> None:
        for kind in ("npz", "hdf5"):
            path = Path(write(kind, rows)).rename(tmp_path / f"log.{kind}.backup")
            assert json.loads(run("inspect", path, "--json").stdout)["kind"] == KINDS[kind]

    def test_memmap(self, rows: Rows, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        source = write("npz", rows)
        in_memory = json.loads(run("inspect", source, "--json").stdout)
        assert json.loads(run("inspect", source, "--json", "--storage", "memmap").stdout) == in_memory
        assert list((tmp_path / "cache").rglob("manifest.json"))

    def test_both_flags(self, rows: Rows, write: Write) -> None:
        rows["truncations"] |= rows["terminations"]
        source = write("npz", rows)
        assert "expected at most one of" in run("inspect", source, expect="refused").stderr
        run("inspect", source, "--prefer-termination", "--strict")

    def test_time_limit(self, rows: Rows, tmp_path: Path) -> None:
        del rows["truncations"], rows["next_observations"]
        path = write_d4rl(tmp_path / "data.hdf5", rows)
        assert "max_episode_steps" in run("inspect", path, expect="refused").stderr
        # 5 to an end, three times 8 to the limit and 5 to an end, 8 to the limit; what follows a limit is not known.
        assert "8 / 48" in run("inspect", path, "--max-episode-steps", "8").stdout
        npz = write_npz(tmp_path / "data.npz", rows)
        assert "only D4RL files" in run("inspect", npz, "--max-episode-steps", "8", expect="usage").stderr


class TestWarnings:
    """Each is triggered alone: the data is healthy otherwise."""

    def test_ends_without_a_flag(self, rows: Rows, write: Write) -> None:
        rows["truncations"][-1] = False
        found = warned(write("npz", rows))
        assert list(found) == ["unflagged-ends"]
        assert found["unflagged-ends"].startswith("1 of 8 episodes end where the record stops")
        assert "the target bootstraps" in found["unflagged-ends"]

    @pytest.mark.parametrize("kind", ["npz", "hdf5"])
    def test_no_flag_at_all(self, rows: Rows, write: Write, kind: str) -> None:
        first = {key: value[:5] for key, value in rows.items()}
        found = warned(write(kind, first | {"terminations": np.zeros(5, bool), "truncations": np.zeros(5, bool)}))
        assert list(found) == ["unflagged-ends"]
        assert found["unflagged-ends"].startswith("no episode is flagged as terminated or truncated")

    def test_neither_flag_in_minari(self, rows: Rows) -> None:
        pytest.importorskip("minari")
        pytest.importorskip("h5py")
        dataset = _dataset(rows)
        to_minari(dataset, MINARI_ID)
        import h5py
        from minari.storage.datasets_root_dir import get_dataset_path

        with h5py.File(get_dataset_path(MINARI_ID) / "data" / "main_data.hdf5", "r+") as file:
            file["episode_1/truncations"][-1] = False
        found = warned(MINARI_ID)
        assert list(found) == ["unflagged-ends"]
        assert found["unflagged-ends"].startswith("1 of 8 episodes end")

    def test_what_the_reader_left_out(self, rows: Rows, write: Write) -> None:
        del rows["next_observations"]
        found = warned(write("hdf5", rows))
        assert list(found) == ["reading"]
        assert found["reading"].startswith("4 transition(s) at the end of truncated episodes were dropped")

    @pytest.mark.parametrize("gamma", [0.0, 0.5, 0.9, 0.99, 1.0])
    def test_returns_with_a_tail_that_is_not_known(self, rows: Rows, write: Write, gamma: float) -> None:
        rows["rewards"][3] = -2.5
        found = warned(write("npz", rows), "--gamma", str(gamma))
        # The steps whose return-to-go holds more than a tenth of what follows the cut.
        stops = np.flatnonzero(rows["terminations"] | rows["truncations"]) + 1
        weighty = 0
        for start, stop in zip([0, *stops[:-1]], stops, strict=True):
            if rows["truncations"][stop - 1]:
                weighty += sum(gamma ** (stop - row) > 0.1 for row in range(start, stop))
        if not weighty:
            assert gamma == 0
            assert found == {}
            return
        assert list(found) == ["return-tail"]
        assert "4 of 8 episodes were cut, and rewards go down to -2.5" in found["return-tail"]
        assert f"({100 * weighty / 52:.1f} % of all transitions)" in found["return-tail"]
        assert "return_tail='bootstrap'" in found["return-tail"]

    def test_returns_of_goal_tasks(self, rows: Rows, write: Write) -> None:
        rows["rewards"] = np.where(np.arange(52) % 3, -1.0, 0.0)
        assert "return_tail='sparse'" in warned(write("npz", rows))["return-tail"]
        rows["terminations"] |= rows["truncations"]
        rows["truncations"][:] = False
        assert warned(write("npz", rows)) == {}, "nothing is cut"

    def test_actions_at_bounds(self, rows: Rows, write: Write) -> None:
        rows["actions"].reshape(-1)[:5] = 1.0
        assert warned(write("npz", rows)) == {}, "5 of 104 are 4.8 %"
        rows["actions"].reshape(-1)[5] = -1.0
        found = warned(write("npz", rows))
        assert list(found) == ["actions-at-bounds"]
        assert "5.8 % of action values" in found["actions-at-bounds"]
        assert "log-density is infinite" in found["actions-at-bounds"]

    def test_actions_outside(self, rows: Rows) -> None:
        rows["actions"] *= 0.5 / np.abs(rows["actions"]).max()
        rows["actions"][3, 1] = -0.51
        found = warned(write_minari(rows, action_space=spaces.Box(-0.5, 0.5, (2,), np.float32)))
        assert list(found) == ["actions-outside"]
        assert found["actions-outside"].startswith("0.96 % of action values lie outside the bounds Box(-0.5 .. 0.5")
        assert "clips" in found["actions-outside"]

    def test_actions_without_bounds(self, rows: Rows) -> None:
        found = warned(write_minari(rows, action_space=spaces.Box(-np.inf, np.inf, (2,), np.float32)))
        assert list(found) == ["unbounded-actions"]
        assert "refuse to start" in found["unbounded-actions"]

    @pytest.mark.parametrize("kind", ["npz", "hdf5"])
    def test_bounds_that_were_inferred(self, rows: Rows, write: Write, kind: str) -> None:
        actions = rows["actions"] / np.abs(rows["actions"]).max()
        for scale, words in ((2.5, "are not normalised, and their bounds Box(-2.5"), (0.4, "no action is larger than 0.4")):
            rows["actions"] = (scale * actions).astype(np.float32)
            rows["actions"][0, 0] = -scale
            found = warned(write(kind, rows))
            assert list(found) == ["inferred-action-space"]
            assert words in found["inferred-action-space"]
            assert "is refused" not in found["inferred-action-space"], "models with the environment's own bounds take such data"

    def test_numbers_of_choices_that_were_inferred(self, rows: Rows, write: Write) -> None:
        rows["actions"] = np.arange(52) % 4
        found = warned(write("npz", rows))
        assert list(found) == ["inferred-action-space"]
        assert "Discrete(4) was inferred from the largest value" in found["inferred-action-space"]
        assert "is refused" not in found["inferred-action-space"]

    def test_observations_that_never_change(self, rows: Rows, write: Write) -> None:
        rows["observations"][:, 1] = rows["next_observations"][:, 1] = 0.25
        found = warned(write("npz", rows))
        assert list(found) == ["constant-observations"]
        assert "1 observation column(s) never change (observations[1])" in found["constant-observations"]
        assert "variance of 0" in found["constant-observations"]

    def test_pixels_that_never_change_are_no_news(self, rows: Rows, write: Write) -> None:
        images = np.random.default_rng(0).integers(0, 255, (52, 4, 4), np.uint8)
        images[:, 0] = 0
        following = np.roll(images, -1, axis=0)
        assert warned(write("npz", rows | {"observations": images, "next_observations": following})) == {}

    def test_actions_that_never_change(self, rows: Rows, write: Write) -> None:
        rows["actions"][:, 0] = 0.25
        found = warned(write("npz", rows))
        assert list(found) == ["constant-actions"]
        assert "(actions[0])" in found["constant-actions"]

    def test_rewards_that_say_nothing(self, rows: Rows, write: Write) -> None:
        rows["rewards"][:] = 0
        found = warned(write("npz", rows))
        assert list(found) == ["constant-rewards"]
        assert found["constant-rewards"].startswith("every reward is 0: all policies are worth the same")
        rows["rewards"][:] = 2.0
        assert warned(write("npz", rows)) == {}, "an episode's end says enough, as on CartPole"
        rows["truncations"] |= rows["terminations"]
        rows["terminations"][:] = False
        assert warned(write("npz", rows))["constant-rewards"].startswith("every reward is 2 and no episode terminates")

    def test_sparse_rewards(self, rows: Rows, write: Write) -> None:
        rows["rewards"][:] = 0
        rows["rewards"][[4, 10]] = 1
        found = warned(write("npz", rows))
        assert list(found) == ["sparse-rewards"]
        assert found["sparse-rewards"].startswith("96.15 % of rewards are 0, and 6 of 8 episodes have no other")
        assert f"holds {256 * 2 / 52:.1f} others" in found["sparse-rewards"]
        rows["rewards"][[5, 6]] = 1
        assert warned(write("npz", rows)) == {}, "48 of 52 are 92 %"

    def test_returns_far_from_new_critics(self, rows: Rows, write: Write) -> None:
        rows["rewards"] = np.linspace(0.0, 100.0, 52)
        found = warned(write("npz", rows))
        assert list(found) == ["high-returns"]
        mean = float(found["high-returns"].split()[3].replace(",", ""))
        assert mean == pytest.approx(_dataset(rows).returns_to_go(0.99).mean(), rel=1e-3)
        assert "scale_rewards" not in found["high-returns"], "to lower them all would make an early end worth more"
        assert warned(write("npz", rows | {"rewards": rows["rewards"] / 10})) == {}
        rows["truncations"] |= rows["terminations"]
        rows["terminations"][:] = False
        found = warned(write("npz", rows))
        assert "dataset.scale_rewards(shift=-100)" in found["high-returns"]
        assert "ScaleReward(env, shift=-100)" in found["high-returns"]
        rows["rewards"] -= 100.0
        assert list(warned(write("npz", rows))) == ["return-tail"], "new critics start above"

    def test_shown_as_text(self, rows: Rows, write: Write) -> None:
        rows["rewards"][:] = 0
        source = write("npz", rows)
        assert "warning constant-rewards: every reward is 0" in run("inspect", source).stdout
        run("inspect", source, "--strict", expect="strict")


def _dataset(rows: Rows, **options: Any) -> OfflineDataset:
    from cql_plugins.adapters import from_arrays

    given = {
        "observation_space": spaces.Box(-np.inf, np.inf, (3,), np.float32),
        "action_space": spaces.Box(-1.0, 1.0, (2,), np.float32),
    }
    return from_arrays(**rows, **given | options)


SPOILT: dict[str, tuple[str, str]] = {
    "cut": (".hdf5", r"cut\.hdf5.*expected a complete HDF5 file"),
    "pickled": (".npz", r"pickled\.npz, field 'observations': expected a plain array of numbers, got Python objects"),
    "nan": (".npz", r"nan\.npz, field 'rewards', row 3: expected finite values, got nan"),
    "misaligned": (".hdf5", r"misaligned\.hdf5, field 'actions': expected 52 rows, got 51"),
    "text": (".md", r"text\.md: expected a \.hdf5, \.h5 or \.npz file, .*; this is another kind of file"),
    "array": (".npz", r"array\.npz: expected an \.npz file, got a single \.npy array"),
    "fields": (".npz", r"fields\.npz, field 'rewards': expected this field"),
}
"""Suffix, and what the refusal says."""


def spoil(name: str, folder: Path, rows: Rows) -> Path:
    path = folder / f"{name}{SPOILT[name][0]}"
    if name == "cut":
        whole = write_d4rl(path, rows).read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
    elif name == "pickled":
        write_npz(path, rows | {"observations": np.array([{"a": 1}] * 52, dtype=object)})
    elif name == "nan":
        rows["rewards"][3] = np.nan
        write_npz(path, rows)
    elif name == "misaligned":
        write_d4rl(path, rows | {"actions": rows["actions"][:-1]})
    elif name == "text":
        path.write_text("# Not a data set\n")
    elif name == "array":
        with path.open("wb") as file:
            np.save(file, rows["rewards"])
    else:
        del rows["rewards"]
        write_npz(path, rows)
    return path


class TestSpoilt:
    """Refused with a line that says what and where, and exit code 1."""

    @pytest.mark.parametrize("command", ["inspect", "convert", "score"])
    @pytest.mark.parametrize("name", SPOILT)
    def test_refused(self, rows: Rows, tmp_path: Path, name: str, command: str) -> None:
        path = spoil(name, tmp_path, rows)
        more = {"inspect": ["--json"], "convert": [tmp_path / "out.npz"], "score": []}[command]
        result = run(command, path, *more, expect="refused")
        assert result.stdout == ""
        assert re.search(SPOILT[name][1], result.stderr)
        assert len(result.stderr.splitlines()) == 1
        assert [one.name for one in tmp_path.iterdir()] == [path.name]

    @pytest.mark.parametrize(
        ("source", "message"),
        [
            ("absent.hdf5", r"absent\.hdf5: expected an HDF5 file, there is no such file"),
            ("absent.npz", r"absent\.npz: expected an \.npz file, there is no such file"),
            ("./absent", r"\./absent: .*there is no such file or folder"),
            ("made/up-v7", r"made/up-v7: expected a data set on this machine.*minari download made/up-v7"),
            ("../up-v0", r"there is no such file or folder"),
            ("made/../up-v0", r"expected an id of words between slashes"),
            ("empty", r"empty: .*this folder has no data/metadata\.json"),
        ],
    )
    def test_absent(self, source: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        if source.startswith("made"):
            pytest.importorskip("minari")
        (tmp_path / "empty").mkdir()
        monkeypatch.chdir(tmp_path)
        assert re.search(message, run("inspect", source, expect="refused").stderr)

    def test_names_that_a_terminal_would_act_on(self, rows: Rows, tmp_path: Path) -> None:
        key = "\x1b[2Jgone"
        rows["observations"][:] = rows["next_observations"][:] = 0
        for field in ("observations", "next_observations"):
            rows[f"{field}/{key}"] = rows.pop(field)
        shown = run("inspect", write_npz(tmp_path / "data.npz", rows)).stdout
        assert "\x1b" not in shown
        assert "observations.\\x1b[2Jgone[0]" in shown
        rows[f"observations/{key}"][0] = np.nan
        said = run("inspect", write_npz(tmp_path / "data.npz", rows), expect="refused").stderr
        assert "\x1b" not in said
        assert "field 'observations.\\x1b[2Jgone', row 0" in said

    def test_minari_without_spaces(self, rows: Rows, write: Write) -> None:
        folder = Path(write("folder", rows))
        metadata = folder / "data" / "metadata.json"
        metadata.write_text(json.dumps(json.loads(metadata.read_text()) | {"action_space": None}))
        assert "field 'action_space': expected a space" in run("inspect", folder, expect="refused").stderr

    @pytest.mark.parametrize(("module", "extra", "suffix"), [("h5py", "d4rl", "hdf5"), ("matplotlib", "plots", "npz")])
    def test_missing_extra(
        self, rows: Rows, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, extra: str, suffix: str
    ) -> None:
        source = write(suffix, rows)
        monkeypatch.setitem(sys.modules, module, None)
        result = run("inspect", source, "--figure", tmp_path / "out.png", expect="refused")
        assert f'pip install "cql-plugins[{extra}]"' in result.stderr

    def test_too_large(self, rows: Rows, write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
        source = write("npz", rows)
        monkeypatch.setenv("CQL_PLUGINS_MAX_MEMORY", "1000")
        assert "expected at most 1,000 bytes" in run("inspect", source, expect="refused").stderr
        monkeypatch.setenv("CQL_PLUGINS_MAX_MEMORY", "1 GB")
        assert "must be a whole number of bytes" in flat(run("inspect", source, expect="usage").stderr)


class TestFigure:
    pytestmark = pytest.mark.usefixtures("matplotlib")

    @pytest.fixture
    def matplotlib(self) -> Any:
        return pytest.importorskip("matplotlib")

    @pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
    def test_files_and_themes(self, rows: Rows, write: Write, tmp_path: Path, suffix: str) -> None:
        source = write("npz", rows)
        for theme in ("light", "dark"):
            run("inspect", source, "--figure", tmp_path / f"{theme}.{suffix}", "--theme", theme)
        light, dark = ((tmp_path / f"{theme}.{suffix}").read_bytes() for theme in ("light", "dark"))
        assert len(light) > 5000
        assert light != dark
        assert light.startswith({"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[suffix])

    def test_what_is_drawn(self, rows: Rows, tmp_path: Path) -> None:
        from cql_plugins.adapters._figure import draw

        rows["actions"][:13, 1] = 0.995
        figure = draw(_dataset(rows), tmp_path / "out.png", gamma=0.5)
        returns, episodes, lengths, rewards, actions, to_go = figure.axes
        assert sum(bar.get_height() for bar in returns.patches) == 8
        assert sum(bar.get_height() for bar in lengths.patches) == 8
        assert sum(bar.get_height() for bar in rewards.patches) == 52
        assert [line.get_label() for line in episodes.get_lines()] == ["terminated (4)", "truncated (4)"]
        assert episodes.get_lines()[0].get_xdata().tolist() == [0, 2, 4, 6]
        assert [bar.get_height() for bar in actions.patches] == [0, 0, 0, 25]
        median = to_go.get_lines()[0].get_ydata()
        assert len(median) == 8
        last = [rows["rewards"][stop - 1] for stop in (26, 52)]  # the two episodes that have eight steps
        assert median[7] == pytest.approx(sorted(last)[round(0.5)], rel=1e-6)
        names = {axis.get_xlabel() for axis in figure.axes}
        assert "undiscounted return, units of the reward" in names
        assert all(axis.get_ylabel() for axis in figure.axes)

    @pytest.mark.parametrize("change", ["discrete", "one step", "constant", "no bounds"])
    def test_odd_data(self, rows: Rows, tmp_path: Path, change: str) -> None:
        from cql_plugins.adapters._figure import draw

        options: dict[str, Any] = {}
        if change == "discrete":
            rows["actions"], options["action_space"] = np.arange(52) % 3 + 5, spaces.Discrete(4, start=5)
        elif change == "one step":
            rows = {key: value[4:5] for key, value in rows.items()}
        elif change == "constant":
            rows["rewards"][:] = 0
        else:
            options["action_space"] = spaces.Box(-np.inf, np.inf, (2,), np.float32)
        figure = draw(_dataset(rows, **options), tmp_path / "out.png", gamma=0.99, theme="dark")
        assert len(figure.axes) == 6

    def test_another_suffix(self, rows: Rows, write: Write, tmp_path: Path) -> None:
        source = write("npz", rows)
        assert ".png, .svg, .pdf" in flat(run("inspect", source, "--figure", tmp_path / "a.gif", expect="usage").stderr)

    def test_a_place_that_cannot_be_written(self, rows: Rows, write: Write) -> None:
        source = write("npz", rows)
        assert "could not write" in run("inspect", source, "--figure", Path(source) / "a.png", expect="refused").stderr


# Convert --------------------------------------------------------------------------------------------------------------

TARGETS = {"d4rl": "{}.hdf5", "npz": "{}.npz", "minari": "./{}/mine-v0"}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def need(*kinds: str) -> None:
    for kind in kinds:
        for module in {"npz": [], "d4rl": ["h5py"], "minari": ["minari", "h5py"]}[kind]:
            pytest.importorskip(module)


def read_back(kind: str, target: str, like: OfflineDataset) -> OfflineDataset:
    if kind == "minari":
        return from_minari(Path(target))
    read = from_npz if kind == "npz" else from_d4rl
    return read(target, observation_space=like.observation_space, action_space=like.action_space)


def data_of(kind: str, target: str) -> bytes:
    return (Path(target) / "data" / "main_data.hdf5" if kind == "minari" else Path(target)).read_bytes()


def tree(folder: Path) -> dict[str, str]:
    """Everything under a folder, with a hash of each file."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
    }


PAIRS = [(first, second) for first in TARGETS for second in TARGETS if first != second]


class TestConvert:
    @pytest.mark.parametrize(("first", "second"), PAIRS)
    def test_round_trip(self, rows: Rows, here: Path, first: str, second: str, assert_same: Any) -> None:
        """There and back: every value, and the very bytes."""
        need(first, second)
        dataset = _dataset(rows)
        to_npz(dataset, here / "start.npz")
        a, b, back = TARGETS[first].format("a"), TARGETS[second].format("b"), TARGETS[first].format("back")
        run("convert", "start.npz", a)
        shown = run("convert", a, b)
        assert f"8 episodes, 52 transitions, {second}" in shown.stdout
        assert shown.stderr == ""
        run("convert", b, back)
        for kind, target in ((first, a), (second, b), (first, back)):
            assert_same(read_back(kind, target, dataset), dataset)
        assert data_of(first, back) == data_of(first, a)
        if first == "minari":
            assert tree(here / "back") == tree(here / "a"), "the metadata, too"
        # The twin: one value is another.
        rows["rewards"][7] += 1e-9
        to_npz(_dataset(rows), here / "changed.npz")
        other = TARGETS[first].format("other")
        run("convert", "changed.npz", other)
        assert data_of(first, other) != data_of(first, a)
        with pytest.raises(AssertionError):
            assert_same(read_back(first, other, dataset), dataset)

    @pytest.mark.parametrize(("first", "second"), PAIRS)
    def test_images_and_choices(self, rows: Rows, here: Path, first: str, second: str, assert_same: Any) -> None:
        need(first, second)
        rng = np.random.default_rng(0)
        pictures = rng.integers(0, 256, (60, 4, 4, 3), np.uint8)
        stops = np.flatnonzero(rows["terminations"] | rows["truncations"]) + 1
        at = np.arange(52) + np.searchsorted(stops, np.arange(52), side="right")
        for field, shift in (("observations", 0), ("next_observations", 1)):
            rows[field] = {"eye": {"left": pictures[at + shift]}, "state": rows[field]}
        rows["actions"] = np.arange(52) % 3
        space = spaces.Dict(
            {
                "eye": spaces.Dict({"left": spaces.Box(0, 255, (4, 4, 3), np.uint8)}),
                "state": spaces.Box(-np.inf, np.inf, (3,), np.float32),
            }
        )
        dataset = _dataset(rows, observation_space=space, action_space=spaces.Discrete(3))
        to_npz(dataset, here / "start.npz")
        if "minari" in (first, second) and _minari_makes_jpegs():
            pytest.skip("this Minari stores images as JPEG only")
        a, b, back = TARGETS[first].format("a"), TARGETS[second].format("b"), TARGETS[first].format("back")
        for source, target in (("start.npz", a), (a, b), (b, back)):
            run("convert", source, target)
        assert_same(read_back(second, b, dataset), dataset)
        assert data_of(first, back) == data_of(first, a)

    def test_what_a_format_does_not_hold_is_said(self, rows: Rows, here: Path) -> None:
        need("minari")
        space = spaces.Box(-2.0, 2.0, (2,), np.float32)
        dataset = _dataset(rows, action_space=space, env_id="Pendulum-v1", references=(-3.0, 4.0))
        to_minari(dataset, MINARI_ID)
        said = run("convert", MINARI_ID, "data.npz").stderr
        assert "action_space Box(-2 .. 2, (2,), float32); env_id 'Pendulum-v1'; references (-3.0, 4.0)" in said
        assert "observation_space" not in said
        to_minari(_dataset(rows), "made/plain-v0")
        assert run("convert", "made/plain-v0", "plain.npz").stderr == ""
        to_minari(_dataset(rows, env_id="Pendulum-v1"), "made/again-v0")
        assert run("convert", "made/again-v0", "made/copy-v0").stderr == ""
        assert from_minari("made/copy-v0").env_id == "Pendulum-v1"
        shown = run("convert", "plain.npz", "made/named-v0", "--env-id", "Nowhere-v7").stderr
        assert "Nowhere-v7 is not stored" in shown
        run("convert", "plain.npz", "made/given-v0", "--env-id", "Pendulum-v1")
        assert from_minari("made/given-v0").env_id == "Pendulum-v1"

    def test_metadata_comes_along(self, rows: Rows, here: Path, minari_home: Path) -> None:
        need("minari")
        spec = EnvSpec("Nowhere-v7", entry_point="nowhere:Env", kwargs={"goal": "left"})
        said = {"algorithm_name": "SAC", "code_permalink": "https://x.y", "description": "mine"}
        persons = {"author": {"A. Name", "B. Name"}, "author_email": {"a@b"}}
        stored = to_minari(_dataset(rows, references=(0.0, 9.0)), MINARI_ID, env_spec=spec, **said, **persons)  # type: ignore[arg-type]
        stored.storage.update_metadata({"requirements": ["mujoco>=3"], "eval_env_spec": spec.to_json(), "note": [1]})

        def metadata(dataset_id: str) -> dict[str, Any]:
            found: dict[str, Any] = json.loads((minari_home / dataset_id / "data" / "metadata.json").read_text())
            del found["dataset_id"], found["dataset_size"], found["data_format"]
            return found | {key: sorted(found[key]) for key in persons}

        before = metadata(MINARI_ID)
        assert run("convert", MINARI_ID, "made/copy-v3").stderr == ""
        assert metadata("made/copy-v3") == before
        if importlib.util.find_spec("pyarrow") is not None:
            assert run("convert", MINARI_ID, MINARI_ID, "--force", "--data-format", "arrow").stderr == ""
            assert metadata(MINARI_ID) == before
        run("convert", MINARI_ID, "made/other-v0", "--env-id", "Pendulum-v1")
        assert from_minari("made/other-v0").env_id == "Pendulum-v1"
        told = flat(run("convert", MINARI_ID, "out.npz").stderr)
        for name in (*said, *persons, "requirements", "eval_env_spec", "note"):
            assert name in told.partition("npz files do not hold the metadata: ")[2].partition(" cql-plugins:")[0]

    @pytest.mark.parametrize("data_format", ["hdf5", "arrow", "parquet"])
    def test_what_episodes_hold_beside_transitions_is_said(self, rows: Rows, here: Path, data_format: str) -> None:
        need("minari")
        if data_format != "hdf5":
            pytest.importorskip("pyarrow")
        import minari
        from minari.data_collector.episode_buffer import EpisodeBuffer
        from minari.dataset._storages import get_storage_keys

        if data_format not in get_storage_keys():
            pytest.skip(f"this Minari has no storage {data_format}")

        def make(dataset_id: str, *besides: dict[str, Any]) -> None:
            minari.create_dataset_from_buffers(
                dataset_id,
                [
                    EpisodeBuffer(
                        observations=np.zeros((4, 2), np.float32),
                        actions=np.zeros((3, 1), np.float32),
                        rewards=[0.0, 0.0, 1.0],
                        terminations=[False, False, True],
                        truncations=[False] * 3,
                        **beside,
                    )
                    for beside in besides
                ],
                observation_space=spaces.Box(-1, 1, (2,)),
                action_space=spaces.Box(-1, 1, (1,)),
                data_format=data_format,
            )

        infos = {"success": np.array([[0], [0], [0], [1]])}  # Of numbers without a shape Minari's Arrow files are not read.
        for name, besides, expected in (
            ("none", [{}, {}], ""),
            # Minari reads columns of Arrow only where all episodes have them.
            (
                "infos",
                [{} if data_format == "hdf5" else {"infos": infos}, {"infos": infos}],
                "cql-plugins: note: not carried over: the infos",
            ),
            ("seed", [{"seed": 7}, {}], "cql-plugins: note: not carried over: the seeds"),
            (
                "all",
                [{"seed": 7, "options": {"goal": 3}, "infos": infos}],
                "cql-plugins: note: not carried over: the infos, the seeds, the reset options",
            ),
        ):
            make(f"made/{name}-v0", *besides)
            assert flat(run("convert", f"made/{name}-v0", f"made/{name}-v1").stderr) == expected
            assert expected in flat(run("convert", f"made/{name}-v0", f"{name}.npz").stderr)

    def test_metadata_that_cannot_be_carried(self, rows: Rows, here: Path, minari_home: Path) -> None:
        need("minari")
        to_minari(_dataset(rows), MINARI_ID)
        path = minari_home / MINARI_ID / "data" / "metadata.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"algorithm_name": 5, "author": [1], "description": None}))
        told = flat(run("convert", MINARI_ID, "made/copy-v0").stderr)
        assert told.endswith(
            "not carried over: the metadata's algorithm_name, the metadata's author, the metadata's description"
        )

    @pytest.mark.filterwarnings("ignore:.*rewards are stored as they are now")
    def test_rewards_stored_after_scaling(self, rows: Rows, here: Path) -> None:
        need("minari")
        original = _dataset(rows, references=(0.0, 10.0))
        scaled = original.scale_rewards(10, -5)
        to_minari(scaled, "hopper-medium-v2")  # Its name is known, so references are looked up.
        own = json.loads(run("score", "hopper-medium-v2", "--references", "0", "10", "--json").stdout)
        np.testing.assert_allclose(own["scores"], original.normalized_score())
        said = run("convert", "hopper-medium-v2", "made/copy-v0").stderr
        assert "note: made/copy-v0: rewards are stored as they are now, after scale_rewards" in flat(said)
        np.testing.assert_allclose(from_minari("made/copy-v0", references=(0.0, 10.0)).normalized_score(), own["scores"])
        assert "scores of them are wrong" in flat(run("convert", "made/copy-v0", "copy.npz").stderr)
        to_minari(OfflineDataset.concatenate([original, scaled]), "made/joined-v0")
        args = ("score", "made/joined-v0", "--references", "0", "10")
        assert "they have no score" in run(*args, expect="refused").stderr

    def test_what_was_guessed_is_said(self, rows: Rows, here: Path) -> None:
        need("minari")
        rows["actions"] *= 3
        write_npz(here / "data.npz", rows)
        assert "stored as if it were known: actions are not normalised" in run("convert", "data.npz", MINARI_ID).stderr

    def test_what_the_reader_left_out_is_said(self, rows: Rows, here: Path) -> None:
        del rows["next_observations"]
        write_npz(here / "data.npz", rows)
        assert "note: 4 transition(s) at the end of truncated episodes were dropped" in run(
            "convert", "data.npz", "out.npz"
        ).stderr.replace("\n", " ")

    @pytest.mark.parametrize("kind", TARGETS)
    def test_taken_names(self, rows: Rows, here: Path, kind: str, assert_same: Any) -> None:
        need(kind)
        dataset, target = _dataset(rows), TARGETS[kind].format("out")
        to_npz(dataset, here / "first.npz")
        to_npz(dataset[:3], here / "second.npz")
        run("convert", "first.npz", target)
        before = tree(here)
        assert "--force" in flat(run("convert", "second.npz", target, expect="usage").stderr)
        assert tree(here) == before
        run("convert", "second.npz", target, "--force")
        assert_same(read_back(kind, target, dataset), dataset[:3])
        assert tree(here).keys() == before.keys(), "nothing else is left"

    def test_a_folder_of_something_else_is_never_replaced(self, rows: Rows, here: Path) -> None:
        need("minari")
        to_npz(_dataset(rows), here / "start.npz")
        (here / "thesis-v2").mkdir()
        (here / "thesis-v2" / "draft.txt").write_text("mine")
        before = tree(here)
        said = run("convert", "start.npz", "./thesis-v2", "--force", expect="usage").stderr
        assert "is no Minari data set" in flat(said)
        assert tree(here) == before

    @pytest.mark.parametrize("kind", TARGETS)
    def test_onto_itself(self, rows: Rows, here: Path, kind: str, assert_same: Any) -> None:
        need(kind)
        to_npz(_dataset(rows), here / "start.npz")
        target = TARGETS[kind].format("out")
        run("convert", "start.npz", target)
        before = tree(here)
        run("convert", target, target, "--force")
        assert tree(here) == before

    @pytest.mark.parametrize("force", [False, True])
    @pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
    @pytest.mark.parametrize("kind", TARGETS)
    def test_killed_in_the_middle(
        self, rows: Rows, here: Path, minari_home: Path, monkeypatch: pytest.MonkeyPatch, kind: str, error: Any, force: bool
    ) -> None:
        need(kind)
        to_npz(_dataset(rows), here / "start.npz")
        target = TARGETS[kind].format("out")
        run("convert", "start.npz", target)
        if not force:
            target = TARGETS[kind].format("another")
            (here / "another").mkdir()
        before = tree(here)

        def fail_half_way(self: StepColumn) -> Any:
            yield 0, self.block_rows, self.read(0, self.block_rows)
            raise error

        monkeypatch.setattr(StepColumn, "blocks", fail_half_way)
        if kind == "minari":
            from minari.dataset._storages.hdf5_storage import HDF5Storage

            write = HDF5Storage.update_episodes

            def fail(self: Any, episodes: Any) -> None:
                taken = list(itertools.islice(episodes, 1))
                write(self, taken)
                if taken:
                    raise error

            monkeypatch.setattr(HDF5Storage, "update_episodes", fail)
        result = typer.testing.CliRunner().invoke(app, ["convert", "start.npz", target, *["--force"] * force])
        assert result.exit_code == (1 if isinstance(error, OSError) else 130)
        assert tree(here) == before
        assert tree(minari_home) == {}

    def test_what_another_process_writes_meanwhile_stays(
        self, rows: Rows, here: Path, monkeypatch: pytest.MonkeyPatch, assert_same: Any
    ) -> None:
        """Another data set in the same new namespace, then one under the same id."""
        need("minari")
        from minari.dataset._storages.hdf5_storage import HDF5Storage

        dataset, write, theirs = _dataset(rows), HDF5Storage.update_episodes, list[str]()
        to_npz(dataset, here / "start.npz")

        def write_meanwhile(self: Any, episodes: Any) -> None:
            taken = list(episodes)
            if taken and theirs:
                to_minari(dataset[:3], theirs.pop())
            write(self, taken)

        monkeypatch.setattr(HDF5Storage, "update_episodes", write_meanwhile)
        theirs[:] = ["new/theirs-v0"]
        run("convert", "start.npz", "new/mine-v0")
        theirs[:] = ["new/same-v0"]
        assert "expected an id that is not taken" in run("convert", "start.npz", "new/same-v0", expect="refused").stderr
        for name, expected in (("theirs", dataset[:3]), ("mine", dataset), ("same", dataset[:3])):
            assert_same(from_minari(f"new/{name}-v0"), expected)

    def test_an_id_of_minari(self, rows: Rows, here: Path, minari_home: Path, assert_same: Any) -> None:
        need("minari")
        import minari

        to_npz(_dataset(rows), here / "start.npz")
        for dataset_id in ("deep/er/first-v0", "deep/second-v1", "third-v0"):
            run("convert", "start.npz", dataset_id)
            assert_same(from_minari(dataset_id), _dataset(rows))
        assert sorted(minari.list_local_datasets()) == ["deep/er/first-v0", "deep/second-v1", "third-v0"]
        assert minari.namespace.list_local_namespaces() == ["deep", "deep/er"]
        assert not list(minari_home.rglob(".*"))

    @pytest.mark.parametrize("target", ["no words-v0", "a/../b-v0", "noversion"])
    def test_malformed_ids(self, rows: Rows, here: Path, minari_home: Path, target: str) -> None:
        need("minari")
        to_npz(_dataset(rows), here / "start.npz")
        assert target in run("convert", "start.npz", target, expect="refused").stderr
        assert tree(minari_home) == {}
        assert [path.name for path in here.iterdir()] == ["start.npz"]

    @pytest.mark.parametrize("target", ["noversion", "made/noversion", "./noversion", "data.npzz"])
    def test_ids_without_a_version(self, rows: Rows, here: Path, minari_home: Path, target: str) -> None:
        need("minari")
        to_npz(_dataset(rows), here / "start.npz")
        said = flat(run("convert", "start.npz", target, expect="refused").stderr)
        assert f"{target}: expected an id of words" in said if "z" in target else "such as 'mine/door-v0', got" in said
        assert tree(minari_home) == {}
        assert [path.name for path in here.iterdir()] == ["start.npz"]

    @pytest.mark.parametrize("data_format", ["arrow", "parquet"])
    def test_minari_s_other_storages(self, rows: Rows, here: Path, data_format: str, assert_same: Any) -> None:
        need("minari")
        pytest.importorskip("pyarrow")
        from minari.dataset._storages import get_storage_keys

        if data_format not in get_storage_keys():
            pytest.skip(f"this Minari has no storage {data_format}")
        to_npz(_dataset(rows), here / "start.npz")
        run("convert", "start.npz", MINARI_ID, "--data-format", data_format)
        assert_same(from_minari(MINARI_ID), _dataset(rows))

    def test_a_disk_without_room(self, rows: Rows, here: Path, minari_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        need("minari")
        to_npz(_dataset(rows), here / "start.npz")
        monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 100}))
        said = run("convert", "start.npz", MINARI_ID, expect="refused").stderr
        assert f"expected room for {60 * 3 * 4 + 52 * 2 * 4:,} bytes" in said
        assert tree(minari_home) == {}

    @pytest.mark.parametrize(
        ("args", "message"),
        [
            (["start.npz", "out.hdf5", "--to", "npz"], "out.hdf5 is the name of a d4rl file"),
            (["start.npz", "out.npz", "--env-id", "Pendulum-v1"], "npz files hold none"),
            (["start.npz", "out.npz", "--to", "csv"], "csv"),
            (["start.npz"], "TARGET"),
        ],
    )
    def test_usage(self, rows: Rows, here: Path, args: Sequence[str], message: str) -> None:
        to_npz(_dataset(rows), here / "start.npz")
        assert message in flat(run("convert", *args, expect="usage").stderr)
        assert [path.name for path in here.iterdir()] == ["start.npz"]

    def test_format_where_the_name_does_not_say(self, rows: Rows, here: Path) -> None:
        to_npz(_dataset(rows), here / "start.npz")
        run("convert", "start.npz", "log.backup", "--to", "npz")
        assert (here / "log.backup").read_bytes() == (here / "start.npz").read_bytes()

    def test_progress_goes_to_stderr(self, rows: Rows, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        console = _commands.Console
        monkeypatch.setattr(_commands, "Console", lambda **options: console(force_terminal=True, width=100, **options))
        to_npz(_dataset(rows), here / "start.npz")
        result = run("convert", "start.npz", "out.npz")
        assert re.search(r"writing.*100%", result.stderr)
        assert result.stdout == "out.npz: 8 episodes, 52 transitions, npz\n"


def _minari_makes_jpegs() -> bool:
    import minari

    return bool(minari.__version__ == "0.5.3")


# Score ----------------------------------------------------------------------------------------------------------------


class TestScore:
    @pytest.mark.parametrize(
        ("args", "scores"),
        [
            (["--dataset-name", "hopper-medium-v2", "--returns", "-20.272305", "3234.3"], [0, 100]),
            (["--env-id", "HalfCheetah-v5", "--returns", "-280.178953"], [0]),
            (["--dataset-name", "D4RL/door/human-v2", "--returns", "2880.5693087298737", "-56.512833"], [100, 0]),
            (["--dataset-name", "antmaze-umaze-v2", "--returns", "0.5"], [50]),
            (["--env-id", "Unknown-v0", "--references", "-10", "10", "--returns", "5", "-20", "1e1"], [75, -50, 100]),
            (["--returns=5", "--references", "0", "10"], [50]),
            (["--returns", "5", "--returns", "-5", "--references", "0", "10"], [50, -50]),
            (["--returns=5", "6", "-7", "--references", "0", "10"], [50, 60, -70]),
            (["--returns", "5", "--returns=6", "7", "--references", "0", "10"], [50, 60, 70]),
            (["--returns=5", "--returns", "6", "7", "--references", "0", "10"], [50, 60, 70]),
        ],
    )
    def test_known_values(self, args: list[str], scores: list[float]) -> None:
        found = json.loads(run("score", *args, "--json").stdout)
        assert found["scores"] == pytest.approx(scores, abs=1e-9)
        assert found["mean"] == pytest.approx(sum(scores) / len(scores), abs=1e-9)
        assert f"{scores[0]:.2f}" in run("score", *args).stdout

    def test_own_episodes(self, rows: Rows, tmp_path: Path) -> None:
        path = write_npz(tmp_path / "hopper-medium-v2.npz", rows)
        found = json.loads(run("score", path, "--json").stdout)
        stops = np.flatnonzero(rows["terminations"] | rows["truncations"]) + 1
        returns = np.array([part.sum() for part in np.split(rows["rewards"], stops[:-1])])
        np.testing.assert_allclose(found["returns"], returns)
        np.testing.assert_allclose(found["scores"], 100 * (returns + 20.272305) / (3234.3 + 20.272305))
        assert found["references"] == [-20.272305, 3234.3]
        other = json.loads(run("score", path, "--env-id", "HalfCheetah-v5", "--json").stdout)
        assert other["references"] == [-280.178953, 12135.0]
        given = json.loads(run("score", path, "--returns", "3234.3", "0", "--json").stdout)
        assert given["scores"][0] == pytest.approx(100)
        assert "lower quartile" in run("score", path).stdout

    def test_what_the_reader_left_out_is_said(self, rows: Rows, tmp_path: Path) -> None:
        path = tmp_path / "data.npz"
        assert run("score", write_npz(path, rows), "--references", "0", "1").stderr == ""
        del rows["next_observations"]
        write_npz(path, rows)
        for args in ([], ["--json"]):
            result = run("score", path, "--references", "0", "1", *args)
            assert "note: 4 transition(s) at the end of truncated episodes were dropped" in result.stderr
            assert "note: the scores are of the transitions that could be read" in result.stderr
            assert "note" not in result.stdout
        assert run("score", path, "--references", "0", "1", "--returns", "2").stderr == "", "nothing of the file is scored"

    def test_references_that_are_not_known(self, rows: Rows, tmp_path: Path) -> None:
        path = write_npz(tmp_path / "data.npz", rows)
        assert "no reference returns are known for 'data'. Give --references" in run("score", path, expect="refused").stderr
        assert json.loads(run("score", path, "--references", "0", "1", "--json").stdout)["references"] == [0, 1]

    @pytest.mark.parametrize(
        ("args", "message"),
        [
            (["--returns", "1"], "no reference returns are given"),
            (["--env-id", "Hopper-v4"], "give a data set, or --returns"),
            (["--returns", "1", "--env-id", "Walker-v0"], "known for 'Walker-v0', only for halfcheetah, hopper"),
            (["--returns", "1", "--references", "3", "3"], "the lower one first"),
            (["--returns", "nan", "--references", "0", "3"], "expected finite numbers"),
            (["--returns", "--env-id", "Hopper-v4"], "--returns"),
            (["--returns", "many", "--env-id", "Hopper-v4"], "--returns"),
        ],
    )
    def test_usage(self, args: list[str], message: str) -> None:
        assert message in flat(run("score", *args, expect="usage").stderr)


# Presets --------------------------------------------------------------------------------------------------------------


class TestPresets:
    def test_json(self) -> None:
        """A few of the published numbers, written out."""
        found = json.loads(run("presets", "--json").stdout)
        assert found["antmaze"]["values"]["cql_lagrange_threshold"] == 0.8
        assert found["antmaze"]["values"]["cql_clip_diff"] == [-200.0, None]
        assert (found["antmaze"]["reward_scale"], found["antmaze"]["reward_shift"]) == (10.0, -5.0)
        assert found["kitchen"]["values"]["policy_kwargs"] == {"net_arch": {"pi": [512] * 3, "qf": [512] * 3}}
        assert found["locomotion"]["values"]["cql_alpha"] == 10.0
        assert found["locomotion"]["reward_clip"] is None
        assert found["atari-1"]["reward_clip"] == 1.0
        assert found["adroit-binary"]["offline_steps"] == 20_000
        one = json.loads(run("presets", "kitchen", "--json").stdout)
        assert one == {"kitchen": found["kitchen"]}

    def test_tables(self) -> None:
        from cql_plugins.sb3.presets import PRESETS

        shown = run("presets").stdout
        assert all(f" {name} " in shown for name in PRESETS)
        shown = run("presets", "antmaze").stdout
        for expected in ("cql_lagrange_threshold │ 0.8", "(-200.0, inf)", "10 * r + -5", "Nakamoto et al. 2023"):
            assert expected in shown

    def test_another_name(self) -> None:
        assert "expected one of locomotion, locomotion-medium-expert" in flat(run("presets", "hopper", expect="usage").stderr)


# As a program ---------------------------------------------------------------------------------------------------------


def program(*args: str | Path, code: str | None = None) -> Any:
    start = ["-m", "cql_plugins.cli"] if code is None else ["-c", code]
    return subprocess.run([sys.executable, *start, *map(str, args)], capture_output=True, text=True, check=False)


class TestProgram:
    def test_json_on_stdout_and_nothing_else(self, rows: Rows, tmp_path: Path) -> None:
        rows["actions"] *= 3
        done = program("inspect", write_npz(tmp_path / "data.npz", rows), "--json", "--strict")
        assert (done.returncode, done.stderr) == (3, "")
        assert json.loads(done.stdout)["n_transitions"] == 52

    def test_refusal(self, rows: Rows, tmp_path: Path) -> None:
        done = program("inspect", spoil("nan", tmp_path, rows))
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith(f"cql-plugins: {tmp_path}")
        assert len(done.stderr.splitlines()) == 1

    def test_help_has_the_exit_codes(self) -> None:
        done = program("--help")
        assert done.returncode == 0
        assert "Exit codes: 0 all is well; 1 the data is refused" in flat(done.stdout)
        for command in ("inspect", "convert", "score", "presets"):
            assert command in done.stdout
        assert program("nonsense").returncode == 2

    @pytest.mark.parametrize("module", ["typer", "rich"])
    def test_without_the_extra(self, module: str) -> None:
        done = program(code=f"import sys; sys.modules['{module}'] = None; from cql_plugins.cli import main; main()")
        assert done.returncode == 1
        assert 'pip install "cql-plugins[cli]"' in done.stderr
        assert "Traceback" not in done.stderr

    def test_another_missing_module_is_not_blamed_on_the_extra(self) -> None:
        done = program(code="import sys; sys.modules['gymnasium'] = None; from cql_plugins.cli import main; main()")
        assert done.returncode == 1
        assert "cql-plugins[cli]" not in done.stderr


# Real data ------------------------------------------------------------------------------------------------------------


def test_real_data(data_root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    minari = pytest.importorskip("minari")
    pytest.importorskip("h5py")
    if "0.5.4" not in minari.supported_dataset_versions:
        pytest.skip(f"the real data was written by Minari 0.5.4, {minari.__version__} does not read it")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(data_root / "minari"))
    door = "dapg/door/human-replay-v0"
    assert sorted(warned(door)) == ["actions-at-bounds", "high-returns", "return-tail"]
    assert json.loads(run("score", door, "--json").stdout)["mean"] == pytest.approx(29.0, abs=0.1)
    run("convert", door, tmp_path / "door.hdf5")
    original, copied = from_minari(door), from_d4rl(tmp_path / "door.hdf5")
    np.testing.assert_array_equal(copied.observations, original.observations)
    np.testing.assert_array_equal(copied.actions, original.actions)
    assert find(copied, copied.summary(), 0.99) == find(original, original.summary(), 0.99)
