"""Mutation check: break the penalty in one way at a time; the suite must fail for each.

    python tests/mutants.py            # all mutants, one line each
    python tests/mutants.py sign axis  # some of them

Each mutant is one replacement in a copy of the package. A replacement that finds nothing is an error: the code has changed.
The exit status is the number of mutants that survived.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOSSES, ACTOR_CRITIC, RETURNS, BUFFERS = (
    "cql_plugins/losses.py",
    "cql_plugins/sb3/actor_critic.py",
    "cql_plugins/returns.py",
    "cql_plugins/sb3/buffers.py",
)
OFFLINE, REARRANGE = "cql_plugins/sb3/offline.py", "cql_plugins/sb3/rearrange.py"
D3RLPY = "cql_plugins/d3rlpy/"
Q_LEARNING, QRDQN, TQC, CONSERVATIVE = (f"cql_plugins/sb3/{name}.py" for name in ("q_learning", "qrdqn", "tqc", "conservative"))
OF_SPEED = {"discrete-targets-in-bf16", "takes-a-users-network-apart"}
ENSEMBLES = "cql_plugins/ensembles.py"
CAPTURED, DEVICE_DATA, CQL_CLASS = (f"cql_plugins/sb3/{name}.py" for name in ("captured", "device_data", "cql"))
FRAMES, SHARED, STORAGE = "adapters/frames.py", "cql_plugins/sb3/shared_buffer.py", "adapters/_storage.py"
UNTRUSTED, HDF5, MINARI_FILES, ARROW, NPZ = (
    f"adapters/{name}.py" for name in ("_untrusted", "_hdf5", "_minari_files", "_arrow", "arrays")
)
GUARDS, WATCH = "cql_plugins/_guards.py", "cql_plugins/sb3/watch.py"
FIGURES, DIAGNOSTICS, EVALUATORS, PLOTS = (
    f"cql_plugins/{name}.py" for name in ("_diagnostics", "sb3/diagnostics", "d3rlpy/evaluators", "plots")
)
SOFT_MAXIMUM = "    return temperature * th.logsumexp(logits, dim=2)"

MUTANTS: dict[str, tuple[str, str, str]] = {
    "none": (LOSSES, SOFT_MAXIMUM, SOFT_MAXIMUM),  # must survive: the check itself works
    # The ten ways of the penalty.
    "sign": (LOSSES, "loss = loss + weight * (gap", "loss = loss - weight * (gap"),
    "importance-weight": (LOSSES, "logits = logits - log_density", "logits = logits + log_density"),
    "no-importance-weight": (LOSSES, "        logits = logits - log_density", "        pass"),
    "axis": (
        LOSSES,
        SOFT_MAXIMUM,
        "    return temperature * th.logsumexp(logits, dim=1).mean(1, keepdim=True).expand(logits.shape[:2])",
    ),
    "three-actions": (
        LOSSES,
        SOFT_MAXIMUM,
        "    return temperature * th.logsumexp(logits.unflatten(2, (-1, max(1, logits.shape[2] // 3))).mean(-1), dim=2)",
    ),
    "mean": (LOSSES, SOFT_MAXIMUM, "    return temperature * logits.mean(dim=2)"),
    "max": (LOSSES, SOFT_MAXIMUM, "    return temperature * logits.max(dim=2).values"),
    "divided-by-n": (
        LOSSES,
        SOFT_MAXIMUM,
        "    return temperature * (th.logsumexp(logits, dim=2) - math.log(logits.shape[2]))",
    ),
    "detached-data-term": (
        LOSSES,
        "        q_data,\n        q_sampled,\n        th.cat([group",
        "        q_data.detach(),\n        q_sampled,\n        th.cat([group",
    ),
    "undetached-density": (
        LOSSES,
        "mean, std = mean.detach().unsqueeze(1), std.detach()",
        "mean, std = mean.unsqueeze(1), std",
    ),
    "bound-from-above": (LOSSES, "bounded = q_values.detach() < reference", "bounded = q_values.detach() > reference"),
    "max-backup-order": (
        LOSSES,
        "q_values.min(dim=0).values.max(dim=1, keepdim=True)",
        "q_values.max(dim=0).values.max(dim=1, keepdim=True)",
    ),
    "no-calibration": (LOSSES, "            shares.append", "            q_groups[name] = values\n            shares.append"),
    "calibrates-random": (LOSSES, 'if name == "random" and not calibration.calibrate_random', "if False"),
    "temperature-around-the-density": (
        LOSSES,
        "logits = logits - log_density",
        "logits = logits - log_density / temperature",
    ),
    "temperature-inside-only": (LOSSES, SOFT_MAXIMUM, "    return th.logsumexp(logits, dim=2)"),
    # Around it.
    "next-actions-at-next-states": (
        ACTOR_CRITIC,
        "_critic_outputs(self.critic, batch.observations, actions, self",
        "_critic_outputs(self.critic, batch.next_observations, actions, self",
    ),
    "clamped-density": (
        LOSSES,
        "log_jacobian = 2.0 * (_LOG_2 - pre_tanh - F.softplus(-2.0 * pre_tanh))",
        "log_jacobian = th.log(1 - th.tanh(pre_tanh) ** 2 + 1e-6)",
    ),
    "un-halved": (LOSSES, "    return scale * loss", "    return loss"),
    "entropy-always-in-the-target": (ACTOR_CRITIC, "        if self.backup_entropy:", "        if True:"),
    "sample-for-the-mode": (
        ACTOR_CRITIC,
        "self.actor.action_dist.mode().unsqueeze(1)",
        "self.actor.action_dist.sample().unsqueeze(1)",
    ),
    "d3rlpy-sample-for-the-mode": (D3RLPY + "impl.py", "        if self._options.mode_q_backup:", "        if False:"),
    "d3rlpys-mode-forgotten": (
        "adapters/models.py",
        "        return not (config.soft_q_backup or config.max_q_backup)",
        "        return False",
    ),
    "slow-bf16-in-silence": (ENSEMBLES, 'startswith("cpu") and not multiplies_bf16()', 'startswith("cpu") and False'),
    "gradient-through-the-bound": (
        LOSSES,
        "th.where(bounded, reference, q_values)",
        "th.where(bounded, reference + q_values - q_values.detach(), q_values)",
    ),
    "time-out-as-termination": (
        RETURNS,
        "truncated = truncated & ~terminated & ~cut",
        "truncated = np.zeros_like(terminated)",
    ),
    "partial-returns-online": (
        BUFFERS,
        "        self.returns_to_go[row] = -np.inf",
        "        self.returns_to_go[row] = reward",
    ),
    "hindsight-keeps-the-logged-return": (BUFFERS, "samples.actions[:, -1] = self.to_torch(returns)", "pass"),
    "hindsight-keeps-the-logged-goal": (
        BUFFERS,
        "np.repeat(goals, remaining, axis=0))",
        'self.next_observations["desired_goal"][rows_ahead, columns_ahead])',
    ),
    "hindsight-sums-the-whole-episode": (
        BUFFERS,
        "done_steps = (rows - self.ep_start[rows, columns]) % self.buffer_size",
        "rows = self.ep_start[rows, columns]\n        done_steps = 0",
    ),
    "hindsight-terminates-everywhere": (
        BUFFERS,
        "terminations[last], truncations[last] = ~truncated, truncated",
        "terminations[last] = True",
    ),
    "hindsight-joins-what-a-reset-broke-off": (BUFFERS, "cuts=self._cuts[rows_ahead, columns_ahead],", "cuts=None,"),
    "hindsight-in-two-units": (BUFFERS, "        if not wrong.any():", "        if True:"),
    "tails-not-estimated-anew": (
        "cql_plugins/sb3/conservative.py",
        "self._tails_are_due or self._n_updates",
        "self._n_updates",
    ),
    "resets-not-seen": (BUFFERS, "            self._find_breaks()", "            pass"),
    "one-buffer-for-two-models": (
        BUFFERS,
        "buffer if buffer.has_settings(gamma, tail) else buffer.with_own_returns()",
        "buffer",
    ),
    "failure-not-clipped": (BUFFERS, "float(np.clip(reward, -self._reward_limit, self._reward_limit))", "float(reward)"),
    "lagrange-direction": (LOSSES, "return -(lagrange_multiplier", "return (lagrange_multiplier"),
    # The other bases.
    "discrete-gap-subtracted": (Q_LEARNING, "loss = bellman_loss + weight * gap", "loss = bellman_loss - weight * gap"),
    "discrete-not-calibrated": (Q_LEARNING, "        return batch.returns_to_go", "        return None"),
    "quantiles-not-summed": (QRDQN, "sum_over_quantiles=True", "sum_over_quantiles=False"),
    "double-q-by-the-target": (
        Q_LEARNING,
        "self._quantiles(network, observations) if self.double_q",
        "quantiles if self.double_q",
    ),
    "targets-stand-still-offline": (Q_LEARNING, "return self._is_offline_phase and", "return False and"),
    "random-actions-after-offline": (Q_LEARNING, "        if self._n_offline_steps:", "        if False:"),
    "all-quantiles-kept": (TQC, "n_dropped = self.top_quantiles_to_drop_per_net * outputs.shape[0]", "n_dropped = 0"),
    "smallest-quantiles-dropped": (
        TQC,
        "pooled.topk(n_dropped, dim=2, sorted=False)",
        "pooled.topk(n_dropped, dim=2, largest=False)",
    ),
    # The d3rlpy room and the bridge.
    "discrete-gap-of-the-mean": (
        LOSSES,
        "gap = soft_maximum(q_values, None, temperature) - q_data",
        "gap = (soft_maximum(q_values.mean(0, keepdim=True), None, temperature) - q_data)",
    ),
    "discrete-bounds-the-data": (
        LOSSES,
        "        bound_rate = is_bounded.float().mean()\n    gap = soft",
        "        bound_rate = is_bounded.float().mean()\n        q_data = q_values.gather(2, index).squeeze(2)\n    gap = soft",
    ),
    "d3rlpy-target-of-the-mean-action": (D3RLPY + "impl.py", 'if self._options.conventions == "d3rlpy":', "if True:"),
    "d3rlpy-multiplier-not-averaged": (
        D3RLPY + "impl.py",
        "self._mean_over_processes(gap.mean()) if self._is_distributed else gap.mean()",
        "gap.mean()",
    ),
    "d3rlpy-temperature-not-averaged": (
        D3RLPY + "impl.py",
        "        if self._is_distributed:\n            log_prob",
        "        if False:\n            log_prob",
    ),
    "d3rlpy-shifted-observations": (
        D3RLPY + "buffers.py",
        "observation_rows = rows + self._episode_of_row[rows]",
        "observation_rows = rows",
    ),
    "d3rlpy-unscaled-returns": (D3RLPY + "batches.py", "        if self.reward_scaler is None:", "        if True:"),
    "d3rlpy-partial-returns-online": (D3RLPY + "online.py", "            if episode is not running:", "            if True:"),
    "d3rlpy-broken-off-as-truncated": (D3RLPY + "online.py", "        if end_of(episode).cut:", "        if False:"),
    "d3rlpy-added-row-counts": (D3RLPY + "online.py", "if end_of(episode).padded else rewards", "if False else rewards"),
    "d3rlpy-end-forgotten": (D3RLPY + "online.py", "                mark_end(episode, end)", "                pass"),
    "d3rlpy-joined-episodes": (
        D3RLPY + "online.py",
        "if not self.has_running_episode:\n            self._pending",
        "if False:\n            self._pending",
    ),
    "bridge-forgets-the-targets": (
        "adapters/models.py",
        '((modules["q_funcs"], model.critic), (modules["targ_q_funcs"], model.critic_target))',
        '((modules["q_funcs"], model.critic), (modules["q_funcs"], model.critic_target))',
    ),
    "bridge-forgets-the-epsilon": ("adapters/models.py", "scale**2 - normalized.epsilon", "scale**2"),
    # Memory.
    "oldest-frame-last": (FRAMES, "self._frames_before(rows, k - 1 - slot)", "self._frames_before(rows, slot)"),
    "stacks-across-episodes": (
        FRAMES,
        "found = self._frames[rows - np.minimum(back, ages)]\n        young = np.flatnonzero(ages < back)",
        "found = self._frames[np.maximum(rows - back, 0)]\n        young = np.flatnonzero(rows < back)",
    ),
    "stacks-that-do-not-overlap": (FRAMES, "differs & ~is_start", "differs & is_start & ~is_start"),
    "next-is-current": (SHARED, "self._leaf[rows + episodes + self._shift]", "self._leaf[rows + episodes]"),
    "episodes-without-their-last": (SHARED, "self._leaf[rows + episodes + self._shift]", "self._leaf[rows + self._shift]"),
    "outdated-files": (STORAGE, ' or manifest["source"] != state', ""),
    "half-an-entry": (STORAGE, "        shutil.rmtree(folder, ignore_errors=True)\n    raise", "        pass\n    raise"),
    # Hostile files.
    "opens-pipes": (UNTRUSTED, "    if not stat.S_ISREG(status.st_mode):\n        raise", "    if False:\n        raise"),
    "follows-links-out": (UNTRUSTED, "if not real.is_relative_to(home):", "if False:"),
    "objects-in-arrays": (UNTRUSTED, 'if dtype.kind not in "biuf" or dtype.subdtype is not None:', "if False:"),
    "rows-of-nothing": (UNTRUSTED, " or 0 in shape[1:]:", ":"),
    "any-memory": (UNTRUSTED, "if limit is not None and n_bytes > limit:", "if False:"),
    "any-disk": (UNTRUSTED, "    if n_bytes > free:", "    if False:"),
    "any-packing": (UNTRUSTED, "if declared > max(SMALL, PACKED_AT_MOST * stored):", "if False:"),
    "any-packing-of-members": (NPZ, "if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):", "if False:"),
    "longer-members": (NPZ, "    if declared != held:", "    if declared > held:"),
    "duplicate-members": (NPZ, "        if key in chosen:", "        if False:"),
    "hdf5-links": (HDF5, "if kind != self._h5py.h5l.TYPE_HARD:", "if False:"),
    "hdf5-virtual": (HDF5, "if layout == h5d.VIRTUAL:", "if False:"),
    "hdf5-external-storage": (HDF5, "if properties.get_external_count():", "if False:"),
    "hdf5-circles": (HDF5, "if address in self._known:", "if False:"),
    "hdf5-any-filter": (HDF5, "if unknown or len(set(filters)) != len(filters):", "if False:"),
    "hdf5-unwritten-rows": (HDF5, "if counted.n_chunks != expected:", "if False:"),
    "hdf5-stuffed-chunks": (HDF5, "if counted.largest > chunk_bytes + chunk_bytes // 64 + 1024:", "if False:"),
    "hdf5-gzip-bombs": (HDF5, "if not unpacking.eof:", "if False:"),
    "hdf5-heaps-without-end": (HDF5, "or (index == 0 and length < 16) or index in objects", ""),
    "runs-the-environment": (
        MINARI_FILES,
        "            if not isinstance(text, str):",
        "            if text is None:\n                continue\n            if not isinstance(text, str):",
    ),
    "any-id": (MINARI_FILES, "if not _IDS.fullmatch(dataset_id):", "if False:"),
    "any-number-of-steps": (MINARI_FILES, " or not 0 <= count <= PACKED_AT_MOST * self.n_bytes:", ":"),
    "any-image-decoder": (MINARI_FILES, "if bytes(content[:3]) != ", "if False and bytes(content[:3]) != "),
    "any-image-size": (MINARI_FILES, "        if size != shape[:2]:", "        if False:"),
    "arrow-not-validated": (ARROW, "            batch.validate(full=True)", "            pass"),
    "arrow-compressed": (ARROW, "if message.table(2).has(3):", "if False:"),
    "arrow-overlapping": (ARROW, " or total > n_bytes:", ":"),
    "links-in-the-cache": (STORAGE, "    if not _is_plain(folder, stat.S_ISDIR):", "    if False:"),
    "parts-that-do-not-fit": (STORAGE, "        _check_parts(parts, spaces_, str(folder))", "        pass"),
    # The watch.
    "no-way-back": (WATCH, "        before.restore()\n        stepped = ", "        stepped = "),
    "sick-gradients-used": (WATCH, "        if not _guards.total_is_finite([loss, *gradients]):", "        if False:"),
    "sick-models-saved": (WATCH, "        self.require_finite_parameters()\n        super().save", "        super().save"),
    "unknown-returns-are-sick": (GUARDS, "returns.max().item() < math.inf", "math.isfinite(returns.sum().item())"),
    "devices-step-on": (GUARDS, "optimizer.found_inf = self._sick if can else None", "optimizer.found_inf = None"),
    "no-margin": (GUARDS, "margin = self.high - self.low + _INITIAL_Q", "margin = 0.0"),
    "d3rlpy-no-way-back": (D3RLPY + "watch.py", "        before.restore()\n", ""),
    "d3rlpy-sick-gradients-used": (D3RLPY + "watch.py", "if not _guards.total_is_finite([loss, *gradients]):", "if False:"),
    # Speed that costs correctness.
    "leaves-out-rows-that-matter": (ENSEMBLES, "th.float32: 2.0**-24", "th.float32: 2.0**3"),
    "drops-what-is-not-a-number": (ENSEMBLES, ".logical_not().flatten()", ".logical_not().logical_and(size > 0).flatten()"),
    "draws-without-weight": (ENSEMBLES, "th.where(stays, 1.0 / chance, 0.0)", "stays.to(gradient.dtype)"),
    "draws-what-has-no-chance": (ENSEMBLES, "chance = th.where(chance < 2.0**-24 / n_actions, 0.0, chance)", "pass"),
    "takes-a-users-network-apart": (Q_LEARNING, "type(network).forward is not self._network_class.forward", "False"),
    "graphs-of-tensors-that-are-gone": (CAPTURED, "if surroundings != self._surroundings:", "if False:"),
    "draws-uniformly": (ENSEMBLES, "stays = th.rand_like(chance) < chance", "stays = th.rand_like(chance) < 0.5"),
    "states-part-of-another-state": (ENSEMBLES, "rows.div(n_actions,", "rows.div(n_actions + 1,"),
    "output-layer-in-bf16": (
        ENSEMBLES,
        "(_affine(biases[-1], part, weights[-1]) for part in _in_type_of(biases[-1], saved[-1], space))",
        "(_affine(biases[-1].to(dtype), part, weights[-1].to(dtype)).float() for part in (saved[-1],))",
    ),
    "features-gradient-lost": (ENSEMBLES, "gradient_features += ", "gradient_features = gradient_features * "),
    "workspace-mixes-layers": (ENSEMBLES, '("hidden", group, layer)', '("hidden", group, 1)'),
    "workspace-mixes-flows": (ENSEMBLES, '("flowing", layer % 2)', '("flowing", depth % 2)'),
    "targets-in-bf16": (
        CQL_CLASS,
        "self._critic_outputs(self.critic_target, observations, actions)",
        "self._critic_outputs(self.critic_target, observations, actions, self.precision)",
    ),
    "discrete-targets-in-bf16": (Q_LEARNING, " or not th.is_grad_enabled():", ":"),
    "old-returns-on-the-device": (DEVICE_DATA, "if self._returns_version != self._current_returns_version:", "if False:"),
    "old-statistics-on-the-device": (
        DEVICE_DATA,
        "not (np.array_equal(known[0], rms.mean) and np.array_equal(known[1], rms.var))",
        "False",
    ),
    "old-batch-in-the-graph": (CAPTURED, "        th._foreach_copy_(", "        (lambda *_: None)("),
    "one-graph-for-all": (CAPTURED, "kind = (self._kind(), ", "kind = (0, "),
    "saves-the-devices-rate": (CAPTURED, 'own["lr"] = group["_rate_value"]', "pass"),
    # Seams between runs, models and environments.
    "cut-is-an-end": (RETURNS, "    terminated = terminated & ~cut\n", ""),
    "sums-across-resets": (
        OFFLINE,
        "running = buffer.dones[buffer.pos - 1] == 0",
        "running = buffer.dones[buffer.pos - 1] != 0",
    ),
    "keeps-old-episodes": (REARRANGE, "target.ep_start[:], target.ep_length[:] = 0, 0", "pass"),
    "summed-after-moving": (REARRANGE, "source = with_returns_to_go(source", "_ = with_returns_to_go(source"),
    "no-relabelled-sums": (BUFFERS, "twin.sums_relabelled_rewards = True", "pass"),
    # What is said of the critic.
    "returns-undiscounted": (FIGURES, "weights = [gamma **", "weights = [1.0 **"),
    "entropy-added": (FIGURES, "self.predicted - self.actual - self.entropy", "self.predicted - self.actual + self.entropy"),
    "tail-of-terminations": (FIGURES, "strict=True) if cut]", "strict=True)]"),
    "smallest-tail": (FIGURES, "float(max(tails", "float(min(tails"),
    "std-instead-of-error": (FIGURES, ".std(ddof=1) / np.sqrt(n)", ".std(ddof=1)"),
    "delta-turned": (FIGURES, "self.q_random_max - self.q_data", "self.q_data - self.q_random_max"),
    "entropy-of-the-first-state": (DIAGNOSTICS, "later = episode.observations[1:]", "later = episode.observations[:-1]"),
    "entropy-discounted-late": (DIAGNOSTICS, "np.arange(1, len(episode.rewards))", "np.arange(2, len(episode.rewards) + 1)"),
    "largest-critic": (DIAGNOSTICS, "dim=1).min(dim=1).values", "dim=1).max(dim=1).values"),
    "actions-unscaled": (DIAGNOSTICS, "actions = model.policy.scale_action(actions)", "pass"),
    "half-of-the-actions": (DIAGNOSTICS, "device=actions.device) * 2 - 1", "device=actions.device)"),
    "observations-tiled": (
        DIAGNOSTICS,
        "return observations.repeat_interleave(times, dim=0)",
        "return observations.repeat(times, 1)",
    ),
    "batches-unweighted": (DIAGNOSTICS, "sums += rows * np.array", "sums += _BATCH * np.array"),
    "bonus-where-none-is": (DIAGNOSTICS, 'or not getattr(model, "backup_entropy", True)', ""),
    "lost-life-ends": (DIAGNOSTICS, """not locals_["done"] or (""", """not locals_["done"] or False and ("""),
    "d3rlpy-actions-unscaled": (EVALUATORS, "        if algo.action_scaler is not None:", "        if False:"),
    "d3rlpy-last-action": (EVALUATORS, "        if not self.rewards[-1]:", "        if True:"),
    "d3rlpy-observations-tiled": (
        EVALUATORS,
        "return np.repeat(observations, times, axis=0)",
        "return np.tile(observations, (times, 1))",
    ),
    "d3rlpy-best-is-mean": (EVALUATORS, "-found.delta if self._best else", "found.gap if self._best else"),
    "online-over-offline": (PLOTS, '("online", switch)', '("online", 0.0)'),
    "evaluations-are-online": (PLOTS, '= ["offline"] * len(between)', '= ["online"] * len(between)'),
    "no-wait-in-a-step": (ACTOR_CRITIC, "validate_args=False", "validate_args=True"),
}


def survives(name: str) -> bool:
    """Run the suite against one mutant."""
    path, old, new = MUTANTS[name]
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for part in ("cql_plugins", "adapters", "tests"):
            shutil.copytree(ROOT / part, copy / part, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        source = (copy / path).read_text(encoding="utf-8")
        if source.count(old) != 1:
            raise SystemExit(f"mutant {name}: found its text {source.count(old)} times in {path}, expected once")
        (copy / path).write_text(source.replace(old, new), encoding="utf-8")
        tests = ["tests/test_losses.py", "tests/test_returns.py", "tests/sb3/test_update.py", "tests/sb3/test_buffers.py"]
        tests.append("tests/sb3/test_buffers_again.py")
        if name.startswith("hindsight"):
            tests = ["tests/sb3/test_hindsight.py"]
        if path.startswith((D3RLPY, "adapters/models")):
            tests = [f"tests/d3rlpy/test_{topic}.py" for topic in ("parity", "buffers", "online", "wrapping", "ddp")]
            tests.append("tests/adapters/test_models.py")
        if path in (GUARDS, WATCH):
            tests = ["tests/test_guards.py", "tests/sb3/test_sick.py"]
        if path == D3RLPY + "watch.py":
            tests = ["tests/d3rlpy/test_sick.py"]
        if path in (FIGURES, DIAGNOSTICS, EVALUATORS, PLOTS):
            tests = ["tests/sb3/test_diagnostics.py", "tests/d3rlpy/test_evaluators.py", "tests/test_plots.py"]
        if path in (Q_LEARNING, QRDQN, TQC):
            tests = ["tests/sb3/test_bases.py"]
        if path in (ENSEMBLES, CAPTURED, DEVICE_DATA, CQL_CLASS) or name in OF_SPEED:
            tests = ["tests/test_ensembles.py", "tests/sb3/test_speed_options.py"]
        if path in (UNTRUSTED, HDF5, MINARI_FILES, ARROW, NPZ) or name in ("links-in-the-cache", "parts-that-do-not-fit"):
            tests = ["tests/adapters/test_hostile.py"]
        elif path in (FRAMES, SHARED, STORAGE):
            tests = [f"tests/adapters/test_{topic}.py" for topic in ("frames", "shared", "storage")]
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
        # The copy goes before an editable install of the package.
        environment = os.environ | {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)
        if done.returncode not in (0, 1):
            raise SystemExit(f"mutant {name}: pytest did not run\n{done.stdout}{done.stderr}")
        failed = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
        print(f"{name:32} {'SURVIVED' if done.returncode == 0 else 'killed by ' + failed[0].split()[1]}", flush=True)
        return done.returncode == 0


def main() -> None:
    chosen = sys.argv[1:] or [name for name in MUTANTS if name != "none"]
    if not survives("none"):
        raise SystemExit("the suite fails without any mutant")
    survivors = [name for name in chosen if survives(name)]
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} mutants killed" + (f"; survived: {survivors}" if survivors else ""))
    raise SystemExit(len(survivors))


if __name__ == "__main__":
    main()
