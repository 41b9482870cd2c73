"""Reader and writer for Minari data sets."""

import contextlib
import dataclasses
import inspect
import os
import re
import shutil
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from cql_plugins._files import outermost_missing, remove_leftovers, whole_folder
from cql_plugins.adapters._hdf5 import Unfailing
from cql_plugins.adapters._minari_files import TRANSFORM, MinariFiles, check_id
from cql_plugins.adapters._steps import OnProgress, announce
from cql_plugins.adapters._storage import Allocate, Origin, Storage, check_storage, fingerprint, in_memory, stored
from cql_plugins.adapters._tree import Array, is_mapped, map_leaves, named_leaves, row_nbytes
from cql_plugins.adapters._untrusted import check_memory, parsing
from cql_plugins.adapters._validation import (
    DatasetError,
    Flags,
    Where,
    check_flags,
    check_rewards,
    check_structure,
    check_supported_space,
    check_tree,
    require_extra,
    resolve_both_flags,
)
from cql_plugins.adapters.dataset import Episode, OfflineDataset

if TYPE_CHECKING:
    from gymnasium.envs.registration import EnvSpec
    from minari import MinariDataset

_ENDS_IN_VERSION = re.compile(r"[-\w]-v\d+\Z")


def from_minari(
    id_or_dataset: "str | PathLike[str] | MinariDataset",
    download: bool = False,
    *,
    name: str | None = None,
    references: tuple[float, float] | None = None,
    prefer_termination: bool = False,
    storage: Storage = "memory",
    cache_dir: "str | PathLike[str] | None" = None,
) -> OfflineDataset:
    """Read a Minari data set, whatever its storage (HDF5, Arrow or Parquet).

    Its files are taken as untrusted: they are looked at before Minari opens them, so that nothing in them is run, no other
    file is opened, and what they declare fits (see docs/security.md). A data set object that is passed in has been loaded by
    Minari already; then this is true of its data only.

    An episode that ends with neither flag counts as truncated; one with as many observations as actions lacks its last
    observation, and is treated as `from_arrays` treats data without next observations; a flag inside an episode splits
    it. Each of these is counted in a warning.

    Args:
        id_or_dataset: An id such as `"D4RL/door/human-v2"`, a `pathlib.Path` to a data set's folder wherever it lies, or a
            `minari.MinariDataset` (also one that was filtered or split).
        download: Fetch the id where it is not on disk.
        name: Name of the result; the id where not given.
        references: Returns of a random and of an expert policy; where not given those in the data set's metadata, then
            those looked up by its id and environment.
        prefer_termination: Read a step with both flags as terminated instead of refusing it.
        storage: `memory`, or `memmap` for data larger than it: written once, episode by episode, to column files in a
            cache folder and used from there; again while Minari's files and these arguments are the same.
        cache_dir: The cache folder for `memmap`; where None `cql-plugins/datasets` in the user's cache folder
            (`$XDG_CACHE_HOME`, else `~/.cache`).

    Returns:
        The data set, with Minari's spaces and dtypes.

    Raises:
        DatasetError: If the id is not on disk (with the command that fetches it), the files cannot be read, a field is
            missing, or the data is not valid; episode and row are named.
        ImportError: If Minari or what its storage needs is not installed.
    """
    minari = import_minari()
    if isinstance(id_or_dataset, str):
        dataset, files = _load(minari, id_or_dataset, download)
    elif isinstance(id_or_dataset, PathLike):
        dataset, files = _open(minari, Path(id_or_dataset) / "data", str(id_or_dataset))
    else:
        dataset = id_or_dataset
        files = MinariFiles(Path(dataset.storage.data_path), str(dataset.id), loaded=True)
    name = name or dataset.id
    where = Where(str(dataset.id))
    check_supported_space(dataset.observation_space, "observations", where)
    check_supported_space(dataset.action_space, "actions", where)

    def read(allocate: Allocate) -> tuple[OfflineDataset, list[str]]:
        reader = _EpisodeReader(dataset, files, where, prefer_termination, allocate)
        reader.read()
        return reader.build(), reader.notes()

    if check_storage(storage, cache_dir):
        origin = _origin(dataset, prefer_termination)
        built, notes = stored(origin, cache_dir, lambda columns: read(columns.allocate))
    else:
        built, notes = read(in_memory)
    announce(where.source, notes, stacklevel=3)
    env_spec = dataset.env_spec
    return built._replaced(
        name=name,
        env_id=None if env_spec is None else env_spec.id,
        references=references or _stored_references(dataset),
        reward_transform=_stored_transform(files),
    )


def _origin(dataset: Any, prefer_termination: bool) -> Origin:
    """Tell which files, and which of their episodes, a Minari data set is."""
    data = Path(dataset.storage.data_path)  # `dataset.spec` would parse the id that the metadata has
    return Origin(
        name=str(dataset.id),
        files=[path for path in data.rglob("*") if path.is_file()],
        options={
            "reader": "minari",
            "prefer_termination": prefer_termination,
            "episodes": fingerprint(np.asarray(dataset.episode_indices)),
        },
        folder=data.parent,  # Minari's folder for this data set has its data in `data`.
    )


def import_minari() -> Any:
    """Import Minari, or say how to install it."""
    try:
        import minari
    except ImportError as error:
        raise require_extra("minari", "minari", error) from error
    return minari


def _load(minari: Any, dataset_id: str, download: bool) -> "tuple[Any, MinariFiles]":
    check_id(dataset_id)
    folder = datasets_path(dataset_id) / "data"
    if not folder.exists():
        if not download:
            raise DatasetError(
                "expected a data set on this machine, there is none with this id",
                source=dataset_id,
                hint=f"Fetch it with `minari download {dataset_id}`, or pass download=True",
            )
        with parsing("Minari cannot fetch it", dataset_id):
            minari.download_dataset(dataset_id)
    return _open(minari, folder, dataset_id)


def _open(minari: Any, folder: Path, source: str) -> "tuple[Any, MinariFiles]":
    files = MinariFiles(folder, source)
    try:
        with parsing("Minari cannot open it", source):
            return minari.MinariDataset(folder), files
    except ImportError as error:
        raise require_extra("the data set's storage", "minari,arrow", error) from error


def _stored_references(dataset: Any) -> tuple[float, float] | None:
    metadata = dataset.storage.metadata
    low, high = metadata.get("ref_min_score"), metadata.get("ref_max_score")
    return None if low is None or high is None else (float(low), float(high))


def _stored_transform(files: MinariFiles) -> tuple[float, float] | None:
    """Return what `scale_rewards` did before `to_minari`, so that scores undo it; None where it is not one for all."""
    if TRANSFORM not in files.metadata:
        return 1.0, 0.0
    stored = files.metadata[TRANSFORM]
    return None if stored is None else (float(stored[0]), float(stored[1]))


# Beside the transitions -----------------------------------------------------------------------------------------------

_TEXTS, _PERSONS = ("algorithm_name", "code_permalink", "description"), ("author", "author_email")
_WRITTEN_ANEW = {"total_episodes", "total_steps", "data_format", "jpeg_encoding", "observation_space", "action_space"} | {
    *("env_spec", "dataset_id", "minari_version", "dataset_size", "ref_min_score", "ref_max_score", TRANSFORM)
}


@dataclasses.dataclass
class Beside:
    """What a Minari data set holds beside its transitions.

    Attributes:
        arguments: What of it `to_minari` takes.
        metadata: The rest of its metadata, without what is written anew for other files.
        lost: Names of what no writer takes.
    """

    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)
    lost: list[str] = dataclasses.field(default_factory=list)


def beside_transitions(id_or_folder: "str | PathLike[str]") -> Beside:
    """Look up what a Minari data set holds beside its transitions; for files that `from_minari` has read.

    Raises:
        DatasetError: If the files cannot be read.
    """
    minari = import_minari()
    if isinstance(id_or_folder, str):
        dataset, files = _load(minari, id_or_folder, download=False)
    else:
        dataset, files = _open(minari, Path(id_or_folder) / "data", str(id_or_folder))
    beside = Beside(lost=_beside_episodes(files, str(dataset.id)))
    if dataset.env_spec is not None:
        beside.arguments["env_spec"] = dataset.env_spec
    for key, value in files.metadata.items():
        persons = [value] if isinstance(value, str) else value
        if key in _TEXTS and isinstance(value, str):
            beside.arguments[key] = value
        elif key in _PERSONS and isinstance(persons, list) and all(isinstance(person, str) for person in persons):
            beside.arguments[key] = set(persons)
        elif key in _TEXTS + _PERSONS:
            beside.lost.append(f"the metadata's {key}")
        elif key not in _WRITTEN_ANEW:
            beside.metadata[key] = value
    return beside


def _beside_episodes(files: MinariFiles, source: str) -> list[str]:
    """Name what is stored with the episodes beside their transitions."""
    with parsing("expected episodes that can be read", source):
        found = files.beside_episodes()
    names = {"infos": "the infos", "seed": "the seeds", "options": "the reset options"}
    return [name for key, name in names.items() if key in found]


class _GrowingArray:
    """An array that rows are appended to; `capacity` is an estimate, and right for every data set in order."""

    def __init__(self, like: Array, capacity: int, allocate: Allocate) -> None:
        self._allocate = allocate
        self._values = allocate((max(capacity, len(like)), *like.shape[1:]), like.dtype)
        self._size = 0

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of the rows."""
        dtype: np.dtype[Any] = self._values.dtype
        return dtype

    def append(self, rows: Array) -> None:
        """Copy `rows` to the end."""
        needed = self._size + len(rows)
        if needed > len(self._values):
            grown = self._allocate((needed + needed // 2, *self._values.shape[1:]), self._values.dtype)
            grown[: self._size] = self._values[: self._size]
            self._values = grown
        self._values[self._size : needed] = rows
        self._size = needed

    def finish(self) -> Array:
        """Return the rows, without a copy unless much of the capacity was not used (and is memory)."""
        rows = self._values[: self._size]
        return rows if is_mapped(rows) or 8 * self._size >= 7 * len(self._values) else rows.copy()


class _EpisodeReader:
    """Reads episodes one at a time into flat arrays, so that the data is in memory (or in files) once."""

    def __init__(self, dataset: Any, files: MinariFiles, where: Where, prefer_termination: bool, allocate: Allocate) -> None:
        self.dataset = dataset
        self.files = files
        self.allocate = allocate
        self.where = where
        self.prefer_termination = prefer_termination
        self.fields: dict[str, Any] = {}
        self.unflagged: list[bool] = []
        self.n_unflagged = self.n_dropped = self.n_split = self.n_steps = self.n_bytes = 0

    def read(self) -> None:
        """Append every episode."""
        for index, episode in enumerate(self.files.episodes(self.dataset)):
            try:
                self._read_episode(episode, Where(self.where.source, episode=index))
            except KeyError as error:
                raise self.where.error(f"expected the field {error}, it is missing") from error
        if "rewards" not in self.fields:
            raise self.where.error("expected at least one usable transition, got none")

    def _read_episode(self, episode: Any, where: Where) -> None:
        rewards = check_rewards(episode.rewards, None, "rewards", where)
        n_steps = len(rewards)
        if not n_steps:
            raise where.error("expected at least one step, got an empty episode", field="rewards")
        terminations = check_flags(episode.terminations, n_steps, "terminations", where).copy()
        truncations = check_flags(episode.truncations, n_steps, "truncations", where)
        truncations = resolve_both_flags(
            terminations, truncations, ("terminations", "truncations"), where, self.prefer_termination
        ).copy()
        observations = map_leaves(np.asarray, episode.observations)
        actions = np.asarray(episode.actions)
        check_tree(actions, self.dataset.action_space, n_steps, "actions", where)
        n_observed = self._check_observations(observations, n_steps, where)

        unflagged = not (terminations[-1] or truncations[-1])
        self.n_unflagged += unflagged
        self.n_steps += n_steps
        if unflagged:
            truncations[-1] = True
        if n_observed == n_steps:
            if terminations[-1]:
                observations = map_leaves(lambda leaf: np.concatenate((leaf, leaf[-1:])), observations)
            else:
                self.n_dropped += 1
                n_steps -= 1
                if not n_steps:
                    return
                truncations[n_steps - 1] = not terminations[n_steps - 1]
        rows = slice(0, n_steps)
        self._append(
            observations, actions[rows], rewards[rows], terminations[rows], truncations[rows], where, unflagged=unflagged
        )

    def _check_observations(self, observations: Any, n_steps: int, where: Where) -> int:
        """Check values, and return the number of observations: `T + 1`, or `T` where the last one was not stored."""
        space = self.dataset.observation_space
        check_structure(observations, space, "observations", where)
        lengths = {len(leaf) if getattr(leaf, "ndim", 0) else 0 for _, leaf in named_leaves(observations, "")}
        n_observed = n_steps if lengths == {n_steps} else n_steps + 1
        check_tree(observations, space, n_observed, "observations", where)
        return n_observed

    def _append(
        self,
        observations: Any,
        actions: Array,
        rewards: Array,
        terminations: Flags,
        truncations: Flags,
        where: Where,
        *,
        unflagged: bool,
    ) -> None:
        ends = np.flatnonzero(terminations | truncations)
        self.n_split += len(ends) - 1
        self.unflagged += [False] * (len(ends) - 1) + [unflagged]
        if len(ends) > 1:
            # The observation between two parts is the last of one and the first of the other.
            rows = np.repeat(np.arange(len(rewards) + 1), np.isin(np.arange(len(rewards) + 1), ends[:-1] + 1) + 1)
            observations = map_leaves(lambda leaf: leaf[rows], observations)
        parts = {
            "observations": observations,
            "actions": actions,
            "rewards": rewards,
            "terminations": terminations,
            "truncations": truncations,
        }
        for field, values in parts.items():
            if field not in self.fields:
                extra = self.dataset.total_episodes if field == "observations" else 0
                capacity = int(self.dataset.total_steps + extra)
                if self.allocate is in_memory:
                    self.n_bytes += sum(capacity * row_nbytes(leaf) for _, leaf in named_leaves(values, field))
                    check_memory(self.n_bytes, self.where.source, "total_steps")
                self.fields[field] = map_leaves(lambda leaf, n=capacity: _GrowingArray(leaf, n, self.allocate), values)
            self._append_field(field, values, where)

    def _append_field(self, field: str, values: Any, where: Where) -> None:
        targets = dict(named_leaves(self.fields[field], field))
        for key, leaf in named_leaves(values, field):
            if leaf.dtype != targets[key].dtype:
                raise where.error(f"expected dtype {targets[key].dtype} as in the first episode, got {leaf.dtype}", field=key)
            targets[key].append(leaf)

    def notes(self) -> list[str]:
        """Say what was not in order."""
        notes = []
        if self.n_steps != self.dataset.total_steps:
            notes.append(f"the metadata counts {self.dataset.total_steps} steps, the episodes hold {self.n_steps}")
        if self.n_unflagged:
            notes.append(f"{self.n_unflagged} episode(s) end with neither flag, taken as truncated")
        if self.n_dropped:
            notes.append(
                f"{self.n_dropped} transition(s) at the end of truncated episodes were dropped, since the observation "
                "after them is not given"
            )
        if self.n_split:
            notes.append(f"{self.n_split} flag(s) inside an episode, it is split there")
        return notes

    def build(self) -> OfflineDataset:
        """Hand over the arrays."""
        return OfflineDataset._trusted(
            **{field: map_leaves(lambda values: values.finish(), tree) for field, tree in self.fields.items()},
            unflagged=np.array(self.unflagged, dtype=np.bool_),
            observation_space=self.dataset.observation_space,
            action_space=self.dataset.action_space,
        )


# Writing --------------------------------------------------------------------------------------------------------------


class _SpecOnlyEnv(gym.Env[Any, Any]):
    """Stands for the environment in Minari's metadata, which would otherwise build it to ask for its spaces."""

    def __init__(self, dataset: OfflineDataset, spec: Any) -> None:
        self.spec = spec
        self.observation_space = dataset.observation_space
        self.action_space = dataset.action_space


def to_minari(
    dataset: OfflineDataset,
    dataset_id: str,
    *,
    data_format: str = "hdf5",
    algorithm_name: str | None = None,
    author: str | set[str] | None = None,
    author_email: str | set[str] | None = None,
    code_permalink: str | None = None,
    description: str | None = None,
    env_spec: "EnvSpec | None" = None,
    progress: OnProgress | None = None,
) -> "MinariDataset":
    """Store a data set in Minari's standard format; `from_minari` reads the same transitions back, without loss.

    Infos, seeds and reset options of episodes are not stored: an `OfflineDataset` does not hold them.

    Images are stored raw, not as JPEG, and refused by name where Minari (0.5.3) can only make JPEGs. The environment is stored
    where Gymnasium knows its id or `env_spec` is given, and reference returns where this data set has them. An end that its
    source did not flag is stored as a truncation.

    Rewards are stored as they are now. After `scale_rewards` the reference returns do not fit them and are not stored, with a
    warning: no score is known to Minari then. `from_minari` finds the scale and the shift in the metadata, and undoes them in
    `normalized_score()` where it is given references or looks them up.

    Args:
        dataset: The data set.
        dataset_id: Minari id of the form `namespace/name-v0`, with the version; must not exist.
        data_format: `hdf5`, `arrow` or `parquet`. HDF5 cannot hold keys with slashes, as `flatten_observations()` makes them.
        algorithm_name: What collected the data.
        author: Who collected the data.
        author_email: How to reach them.
        code_permalink: Link to the code that collected the data.
        description: Free text.
        env_spec: The environment, with the arguments it is made with; where None the one that Gymnasium knows by the data
            set's `env_id`.
        progress: Called with the share of the steps that is handed to Minari, in `[0, 1]`.

    Returns:
        The stored `minari.MinariDataset`.

    Raises:
        DatasetError: If the id exists or is malformed, a key is one that HDF5 cannot hold, Minari refuses the data, or the
            disk does not take it. Nothing is left behind then.
        ImportError: If Minari or what its storage needs is not installed.
    """
    check_new_id(dataset_id, dataset_id)
    check_id(dataset_id, dataset_id)
    return store(
        dataset,
        datasets_path(),
        dataset_id,
        data_format=data_format,
        progress=progress,
        algorithm_name=algorithm_name,
        author=author,
        author_email=author_email,
        code_permalink=code_permalink,
        description=description,
        env_spec=env_spec,
    )


def store(
    dataset: OfflineDataset,
    root: Path,
    dataset_id: str,
    *,
    replace: bool = False,
    data_format: str = "hdf5",
    metadata: Mapping[str, Any] | None = None,
    progress: OnProgress | None = None,
    env_spec: "EnvSpec | None" = None,
    **said: Any,
) -> "MinariDataset":
    """Do what `to_minari` does in any folder; a data set is there whole or not at all, and another one stays.

    Args:
        dataset: The data set.
        root: Folder in place of Minari's.
        dataset_id: Id there, which was looked at before.
        replace: Whether to replace the data set that is there, once the new one is whole.
        data_format: See `to_minari`.
        metadata: More metadata.
        progress: See `to_minari`.
        env_spec: See `to_minari`.
        **said: What else Minari takes as it is: author, description and the like.

    Returns:
        The stored `minari.MinariDataset`.

    Raises:
        DatasetError: See `to_minari`.
        ImportError: See `to_minari`.
    """
    minari = import_minari()
    place = root / dataset_id
    if place.exists() and not replace:
        raise _taken(place, dataset_id)
    if data_format == "hdf5":
        _check_keys(dataset.observation_space, "observations", dataset_id)
    as_logged = dataset._reward_transform == (1.0, 0.0)
    more = dict(metadata or {})
    if not as_logged:
        more[TRANSFORM] = _as_numbers(dataset._reward_transform)
    elif dataset.references is not None:
        # Given to Minari's own function, they would make it build the environment and run a random policy in it.
        more["ref_min_score"], more["ref_max_score"] = dataset.references
    said |= {"env": _spec_only_env(dataset, env_spec), "data_format": data_format}
    said |= _ask_for_raw_images(minari, dataset, dataset_id)
    try:
        root.mkdir(parents=True, exist_ok=True)
        _check_room(dataset, root, dataset_id)
        remove_leftovers(outermost_missing(place).parent)
        with whole_folder(place, replace=replace) as folder:
            written = folder / ".minari"
            _write(minari, dataset, written, dataset_id, said, more, progress)
            for path in (written / dataset_id).iterdir():
                path.rename(folder / path.name)
            _make_namespaces(written, root, dataset_id)
            shutil.rmtree(written)
    except ImportError as error:
        raise require_extra(f"Minari's {data_format} storage", _extra_of(data_format), error) from error
    except DatasetError:
        raise
    except FileExistsError as error:
        raise _taken(place, dataset_id) from error
    except Exception as error:
        raise DatasetError(f"Minari cannot store it: {error}", source=dataset_id) from error
    if not as_logged and dataset.references is not None:
        warnings.warn(
            f"{dataset_id}: rewards are stored as they are now, after scale_rewards. The reference returns are not stored: "
            "they are of the rewards before it, so that no score is known. Score the data set before it is scaled",
            stacklevel=3,
        )
    stored: MinariDataset = minari.MinariDataset(place / "data")
    return stored


def _write(
    minari: Any,
    dataset: OfflineDataset,
    root: Path,
    dataset_id: str,
    said: Mapping[str, Any],
    metadata: Mapping[str, Any],
    progress: OnProgress | None,
) -> None:
    """Let Minari make a data set below a folder of its own, and fill it."""
    space_of = {"observations": dataset.observation_space, "actions": dataset.action_space}
    with warnings.catch_warnings(), _datasets_in(root):
        # Minari asks for each piece of metadata that was not given; here leaving one out is the caller's choice.
        warnings.filterwarnings("ignore", message=r".*is set to None", category=UserWarning)
        warnings.filterwarnings("ignore", message="env_spec is None", category=UserWarning)
        storage = minari.create_dataset_from_buffers(
            dataset_id, [], observation_space=dataset.observation_space, action_space=dataset.action_space, **said
        ).storage
    with _unfailing(storage) as check:

        def buffers() -> Iterator[Any]:
            """Give one at a time, since together they may be larger than memory; Minari goes through them once."""
            for episode in _reported(dataset, progress):
                yield _to_buffer(episode, space_of)
                check()

        storage.update_episodes(buffers())
        check()
    if metadata:
        storage.update_metadata(dict(metadata))


@contextlib.contextmanager
def _unfailing(storage: Any) -> Iterator[Callable[[], None]]:
    """Keep it from HDF5 that a disk is full, see `Unfailing`; give what raises it. Arrow needs none of that."""
    path = getattr(storage, "_file_path", None)
    if path is None:
        yield lambda: None
        return
    with open(path, "rb+") as file:
        storage._file_path = unfailing = Unfailing(file)
        try:
            yield unfailing.check
        finally:
            storage._file_path = path


def _make_namespaces(written: Path, root: Path, dataset_id: str) -> None:
    """Make the folders above a data set, with what Minari writes of them, where they are missing."""
    for namespace in Path(dataset_id).parents[:-1]:
        (root / namespace).mkdir(parents=True, exist_ok=True)
        for path in (written / namespace).iterdir():
            if path.is_file() and not (root / namespace / path.name).exists():
                path.rename(root / namespace / path.name)


def _check_room(dataset: OfflineDataset, root: Path, dataset_id: str) -> None:
    """Refuse early what the disk has no room for."""
    n_bytes = sum(leaf.nbytes for _, leaf in named_leaves({"": dataset.observations, "actions": dataset.actions}, ""))
    free = shutil.disk_usage(root).free
    if n_bytes > free:
        raise DatasetError(f"expected room for {n_bytes:,} bytes in {root}: {free:,} are free", source=dataset_id)


def _taken(place: Path, dataset_id: str) -> DatasetError:
    return DatasetError(
        f"expected an id that is not taken, there is a data set at {place}",
        source=dataset_id,
        hint="Choose another name or version, or remove it with minari.delete_dataset",
    )


_ROOT_VARIABLE = "MINARI_DATASETS_PATH"
_REDIRECTING = threading.Lock()


def datasets_path(dataset_id: str = "") -> Path:
    """Return where Minari has a data set, or all of them."""
    import_minari()
    from minari.storage.datasets_root_dir import get_dataset_path

    with _REDIRECTING:
        return Path(get_dataset_path(dataset_id))


@contextlib.contextmanager
def _datasets_in(root: Path) -> Iterator[None]:
    """Have Minari make data sets below another folder: it looks that up in the environment of the process."""
    with _REDIRECTING:
        before = os.environ.get(_ROOT_VARIABLE)
        os.environ[_ROOT_VARIABLE] = str(root)
        try:
            yield
        finally:
            if before is None:
                del os.environ[_ROOT_VARIABLE]
            else:
                os.environ[_ROOT_VARIABLE] = before


def check_new_id(dataset_id: str, source: str) -> None:
    """Refuse an id without a version: Minari reads such data sets, and fails where it is to make one.

    Raises:
        DatasetError: If the id does not end in a name and `-v` with a number.
    """
    if not _ENDS_IN_VERSION.search(dataset_id):
        raise DatasetError(
            f"Malformed dataset ID: expected a name that ends in a version, such as 'mine/door-v0', got {dataset_id[:200]!r}",
            source=source,
        )


def _ask_for_raw_images(minari: Any, dataset: OfflineDataset, dataset_id: str) -> dict[str, bool]:
    """Return the arguments that make Minari store images as they are; before 0.5.3 it does without being asked."""
    if "jpeg_encoding" in inspect.signature(minari.create_dataset_from_buffers).parameters:
        return {"jpeg_encoding": False}
    from minari.dataset import minari_storage

    if hasattr(minari_storage, "is_image_space"):
        # 0.5.3 takes more bytes for an image when it writes than when it reads: nothing of bytes is safe.
        for root, space in (("observations", dataset.observation_space), ("actions", dataset.action_space)):
            for name, leaf in named_leaves(space, root):
                if leaf.dtype == np.uint8:
                    raise DatasetError(
                        f"expected a Minari that can store the bytes of {name} as they are, this one makes JPEGs of them",
                        source=dataset_id,
                        hint='Bring it to 0.5.4 or newer with: pip install "minari>=0.5.4"',
                    )
    return {}


def _check_keys(space: spaces.Space[Any], name: str, dataset_id: str) -> None:
    """Refuse keys that HDF5 takes for paths: Minari would write groups inside groups, and read none of them back."""
    if not isinstance(space, spaces.Dict):
        return
    for key, subspace in space.spaces.items():
        if key in ("", ".", "..") or set(key) & {"/", "\0"}:
            raise DatasetError(
                f"expected keys that HDF5 can hold, without slashes, got {key!r}",
                source=dataset_id,
                field=name,
                hint='Store it with data_format="arrow" or "parquet", or before flatten_observations',
            )
        _check_keys(subspace, f"{name}.{key}", dataset_id)


def _as_numbers(transform: tuple[float, float] | None) -> tuple[float, float] | None:
    """Return a scale and a shift as JSON can hold them; None where they can no longer be undone."""
    if transform is None or not np.isfinite(transform).all() or not transform[0]:
        return None
    return float(transform[0]), float(transform[1])


def _extra_of(data_format: str) -> str:
    return "minari" if data_format == "hdf5" else "arrow"


def _spec_only_env(dataset: OfflineDataset, env_spec: "EnvSpec | None") -> _SpecOnlyEnv | None:
    if env_spec is not None:
        return _SpecOnlyEnv(dataset, env_spec)
    if dataset.env_id is None:
        return None
    try:
        return _SpecOnlyEnv(dataset, gym.spec(dataset.env_id))
    except gym.error.Error:
        return None


def _reported(dataset: OfflineDataset, progress: OnProgress | None) -> "Iterator[Episode]":
    for episode, stop in zip(dataset, dataset.offsets[1:], strict=True):
        yield episode
        if progress is not None:
            progress(int(stop) / len(dataset))


def _to_buffer(episode: Any, space_of: Mapping[str, spaces.Space[Any]]) -> Any:
    from minari.data_collector.episode_buffer import EpisodeBuffer

    return EpisodeBuffer(
        observations=_as_stored(episode.observations, space_of["observations"]),
        actions=_as_stored(episode.actions, space_of["actions"]),
        rewards=episode.rewards,
        terminations=episode.terminations,
        truncations=episode.truncations,
    )


def _as_stored(values: Any, space: spaces.Space[Any]) -> Any:
    """Give values the dtype of their space where that loses nothing.

    Arrow has one dtype per column, that of the space.
    """
    if isinstance(space, spaces.Dict):
        return {key: _as_stored(values[key], subspace) for key, subspace in space.spaces.items()}
    values = np.asarray(values)  # one episode of stacked frames at a time
    if not np.can_cast(values.dtype, np.dtype(space.dtype), casting="safe"):
        raise DatasetError(f"expected values of the dtype of {space} or a narrower one, got {values.dtype}")
    return values.astype(space.dtype, copy=False)
