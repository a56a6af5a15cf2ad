"""Checkpoints: a pytree of arrays and a small JSON position, written whole or not at all.

A run that is killed anywhere resumes from the newest step that can be read. Orbax copies the arrays
to the host and writes them, while the run goes on, into a temporary directory that it renames: a
step is there or it is not. Orbax does not notice a bit that flips afterwards (its compressed chunks
carry no checksum that is read) nor a leaf whose dtype the caller changed (it casts), and it refuses
numpy scalars and empty arrays. Hence a manifest is stored beside every step, with shape, dtype and
checksum of each leaf (`train.checksum`, computed where the leaf is), and compared on the way back.
"""

import collections
import contextlib
import errno
import os
import pathlib
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from dcore_jax import distributed
from dcore_jax.learn import optimizer
from dcore_jax.train import checksum

PyTree = Any


class _Keep:
  """Which steps survive: the newest few and the best one (an Orbax preservation policy)."""

  def __init__(self, newest: int):
    self.newest = newest
    self.scores: dict[int, float] = {}

  @property
  def best(self) -> int | None:
    """Returns the step with the highest score; the newest one of equal scores."""
    return max(self.scores, key=lambda step: (self.scores[step], step), default=None)

  def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
    """Tells for each checkpoint whether it survives; Orbax calls it."""
    del context
    steps = [checkpoint.step for checkpoint in checkpoints]
    # `best` may be None, which is no step and does no harm in the set.
    kept = {*sorted(steps)[-self.newest :], self.best}
    # Orbax asks by place in its own list, in whatever order that is.
    return [step in kept for step in steps]


# The folder of steps of a stage that keeps other things beside them.
STATE = 'state'


class Checkpoints:
  """The steps of one directory; the newest `keep` survive, and the one with the highest score.

  Leaves may be jax arrays (typed keys included), numpy arrays or scalars, Python ints, floats and
  bools. Each comes back as the kind of leaf that stands in the example tree, bit for bit, jax
  arrays with the example's sharding.
  """

  def __init__(self, directory: str | pathlib.Path, keep: int = 2):
    if keep < 1:
      raise ValueError(f'keep={keep}: at least one checkpoint must stay')
    # Orbax takes absolute paths only.
    self._directory = pathlib.Path(directory).absolute()
    self._keep = _Keep(keep)
    options = ocp.CheckpointManagerOptions(
      # Asynchronous: writing goes on while the run takes its next steps.
      preservation_policy=self._keep,
      enable_async_checkpointing=True,
      create=True,
    )
    self._manager = ocp.CheckpointManager(self._directory, options=options)
    # Scores of an earlier process, so that its best step survives this one.
    for step in self.all_steps():
      try:
        score = self._read_record(step)['score']
      except Exception:  # damaged; `restore` reports it if the step is wanted
        continue
      if score is not None:
        self._keep.scores[step] = score

  def latest_step(self) -> int | None:
    """The newest complete step, or None in an empty directory."""
    return self._manager.latest_step()

  def all_steps(self) -> list[int]:
    """Complete steps, oldest first."""
    return sorted(self._manager.all_steps())

  @property
  def best_step(self) -> int | None:
    """The step that was saved with the highest score; None where no step had a score."""
    return self._keep.best

  def save(
    self, step: int, tree: PyTree, extra: dict[str, Any] | None = None, score: float | None = None
  ) -> None:
    """Starts to write a checkpoint; an existing one of the same step is replaced.

    On return the values are copied, and their arrays may be donated. `wait`, `close` and the next
    save wait for the disk.

    Args:
      step: its number.
      tree: the arrays.
      extra: anything that JSON holds.
      score: by which the best step is kept.

    Raises:
      ValueError: a newer step is there already (a run must not go back in its own directory), or a
        leaf is no number.
    """
    latest = self.latest_step()
    if latest is not None and step < latest:
      raise ValueError(
        f'{self._directory} already holds step {latest}; refusing to save the older step {step}'
      )
    # Encoded first: a leaf that cannot be stored must raise before anything is written.
    leaves = {path: _encode(path, leaf) for path, leaf in _flatten(tree)}
    # Sums of the arrays on the devices, before their memory may be donated.
    sums = _sums(leaves)
    described = {
      path: {'shape': list(leaf.shape), 'dtype': str(leaf.dtype), 'sum': sums[path]}
      for path, leaf in leaves.items()
    }
    record = {'extra': extra or {}, 'score': score, 'leaves': described}
    # Orbax stores no empty array; the manifest alone says how to make one again.
    stored = {path: leaf for path, leaf in leaves.items() if leaf.size}
    # One write at a time, so that at most one copy of the arrays waits in host memory.
    self.wait()
    # Orbax refuses to overwrite a step.
    if step == latest:
      self._manager.delete(step)
    # Before `save`, whose preservation policy reads the scores.
    if score is not None:
      self._keep.scores[step] = score
    # The record is an item of the same step, so that both are there or neither.
    arguments = {'record': ocp.args.JsonSave(record)}
    if stored:
      arguments['tree'] = ocp.args.StandardSave(stored)
    # `force`: Orbax would otherwise skip steps by a rule of its own.
    with _full_disk(self._directory):
      self._manager.save(step, args=ocp.args.Composite(**arguments), force=True)

  def restore(
    self, example: PyTree, step: int | None = None
  ) -> tuple[PyTree, dict[str, Any], int] | None:
    """(tree, extra, step) of `step`, or of the newest step that can be read; None without any.

    Without `step`, a checkpoint that cannot be read is set aside as `<step>.unreadable` with a
    warning, and the one before it is taken, down to starting afresh: the work since then is done
    again, and gives the same numbers. If some host cannot read a checkpoint, no host uses it.

    Args:
      example: a tree of the same structure, of arrays or of `jax.ShapeDtypeStruct`; no value in it
        is used.
      step: this step and no other; then a damaged checkpoint raises.

    Raises:
      ValueError: the checkpoint is sound but not of the example's structure, shapes or dtypes; all
        differences are named. (An edited config must never silently restart a run.) Or `step` is
        not there, or is damaged.
    """
    # A step that is still being written is not complete, and would not be found.
    self.wait()
    if step is not None and step not in self.all_steps():
      raise ValueError(f'{self._directory} has no step {step}; it has {self.all_steps()}')
    # Newest first; an explicit step has no alternatives.
    for candidate in [step] if step is not None else self.all_steps()[::-1]:
      record, error = _attempt(self._read_record, candidate)
      if error is None:
        # Structure first: a config that was edited is an error, and not damage to be skipped.
        _check_structure(record['leaves'], example, f'{self._directory}/{candidate}')
        tree, error = _attempt(self._read_tree, candidate, record['leaves'], example)
      if error is None:
        return tree, record['extra'], candidate
      self._give_up_on(candidate, error, explicit=step is not None)
    return None

  def wait(self) -> None:
    """Returns when all that was saved is on disk."""
    with _full_disk(self._directory):
      self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits for the disk and frees Orbax's threads."""
    with _full_disk(self._directory):
      self._manager.close()

  def __enter__(self) -> 'Checkpoints':
    return self

  def __exit__(self, *_) -> None:
    self.close()

  def _read_record(self, step: int) -> dict[str, Any]:
    # The record alone: it is small, and tells whether the arrays fit.
    restored = self._manager.restore(step, args=ocp.args.Composite(record=ocp.args.JsonRestore()))
    record = restored['record']
    # A file that is JSON, but not one of ours.
    if not {'extra', 'score', 'leaves'} <= record.keys():
      raise ValueError(f'the record of step {step} has the fields {sorted(record)}')
    return record

  def _read_tree(self, step: int, described: dict[str, dict], example: PyTree) -> PyTree:
    examples = dict(_flatten(example))
    targets = {path: _target(leaf) for path, leaf in examples.items()}
    # Orbax has stored no empty arrays, so that it cannot return any.
    wanted = {path: target for path, target in targets.items() if 0 not in target.shape}
    values = {}
    if wanted:
      restored = self._manager.restore(
        step, args=ocp.args.Composite(tree=ocp.args.StandardRestore(wanted))
      )
      values = restored['tree']
    # Compared where the values are, before anything uses them.
    _check_sums(values, described)
    empty = {path: np.zeros(t.shape, t.dtype) for path, t in targets.items() if path not in wanted}
    leaves = [_decode((values | empty)[path], leaf) for path, leaf in examples.items()]
    # The example's structure: a manifest names leaves by paths, and holds no containers.
    return jax.tree.unflatten(jax.tree.structure(example), leaves)

  def _give_up_on(self, step: int, error: Exception, *, explicit: bool) -> None:
    """Sets a damaged checkpoint aside, or raises where no other one will do."""
    reason = (
      f'checkpoint {self._directory}/{step} cannot be read '
      f'({type(error).__name__}: {str(error)[:300]})'
    )
    if explicit:
      raise ValueError(reason) from error
    earlier = [s for s in self.all_steps() if s < step]
    instead = f'going back to step {earlier[-1]}' if earlier else 'starting afresh'
    warnings.warn(f'{reason}; {instead}', stacklevel=3)
    # Out of the way, so that the step can be saved again; kept, so that a person can look at it.
    if jax.process_index() == 0:
      aside = self._directory / f'{step}.unreadable'
      shutil.rmtree(aside, ignore_errors=True)
      # Renamed by one host; all hosts share the directory.
      (self._directory / str(step)).rename(aside)
    distributed.wait_for_others(f'without {step}')
    # A step that cannot be read must not be kept as the best one.
    self._keep.scores.pop(step, None)
    # Orbax caches the list of steps.
    self._manager.reload()


@contextlib.contextmanager
def _full_disk(directory: pathlib.Path) -> Iterator[None]:
  """Turns what tensorstore says of a full disk, a page of text, into the system's own error.

  The step that was being written is not complete: the next process deletes it.
  """
  try:
    yield
  except Exception as error:
    text = str(error)
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
      if f"[os_error_code='{number}']" in text or os.strerror(number) in text:
        raise OSError(number, os.strerror(number), str(directory)) from error
    raise


def read_part(step_dir: pathlib.Path, example: PyTree) -> PyTree:
  """Reads those leaves of one checkpoint that `example` has, at the same paths.

  The other leaves are not read, and nothing is changed in the folder.

  Raises:
    ValueError: a leaf is missing or of another shape or dtype (all are named), or the checkpoint is
      damaged.
  """
  targets = {path: _target(leaf) for path, leaf in _flatten(example)}
  try:
    # Without a manager, which would create folders and clean up in another run's directory.
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
      described = reader.restore(step_dir / 'record')['leaves']
  except Exception as error:  # damage shows as any of a dozen types
    raise ValueError(f'checkpoint {step_dir} cannot be read: {error}') from error
  _check_structure(
    # Only the wanted leaves: whatever else the checkpoint holds is not this caller's business.
    {path: leaf for path, leaf in described.items() if path in targets},
    example,
    str(step_dir),
  )
  try:
    with ocp.PyTreeCheckpointer() as reader:
      arguments = ocp.args.PyTreeRestore(
        # Partial: Orbax otherwise insists on every leaf of the checkpoint.
        targets,
        ocp.checkpoint_utils.construct_restore_args(targets),
        partial_restore=True,
      )
      values = reader.restore(step_dir / 'tree', args=arguments)
  except Exception as error:
    raise ValueError(f'checkpoint {step_dir} cannot be read: {error}') from error
  try:
    _check_sums(values, described)
  except ValueError as error:
    raise ValueError(f'checkpoint {step_dir}: {error}') from error
  return jax.tree.unflatten(jax.tree.structure(example), [values[path] for path in targets])


def _attempt(read: Callable[..., Any], *arguments: Any) -> tuple[Any, Exception | None]:
  """(what was read, None), or (None, why it cannot be read by this host or by another)."""
  value = None
  error = None
  try:
    value = read(*arguments)
  # Damage shows as any of a dozen types: OSError, JSONDecodeError, tensorstore's own.
  except Exception as found:
    error = found
  # All hosts decide alike: one that went on alone would wait for the others' collectives.
  if not distributed.everywhere(error is None):
    error = error or ValueError('another host cannot read it')
  return value, error


def _flatten(tree: PyTree) -> list[tuple[str, Any]]:
  """(path, leaf) of each leaf; the paths are names in the manifest."""
  flat = []
  for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
    # A tree that is a single leaf has an empty path.
    flat.append((jax.tree_util.keystr(path, simple=True, separator='/') or 'leaf', leaf))
  return flat


def _is_key(leaf: Any) -> bool:
  return hasattr(leaf, 'dtype') and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _encode(path: str, leaf: Any) -> jax.Array | np.ndarray:
  """Returns the leaf as an array that Orbax stores without a change."""
  if _is_key(leaf):
    # Typed keys are stored as the integers behind them; the example says how to wrap them again.
    return jax.random.key_data(leaf)
  if isinstance(leaf, jax.Array):
    return leaf
  array = np.asarray(leaf)
  # Objects, text and times: numpy would pickle them or store what nothing can read back.
  if array.dtype.kind in 'OUSMm':
    raise ValueError(
      f'{path} is a {type(leaf).__name__}: checkpoint leaves are numbers '
      '(text belongs into `extra`)'
    )
  return array


def _decode(value: Any, example: Any) -> Any:
  """Returns the stored array as a leaf of the example's kind."""
  if _is_key(example):
    return jax.random.wrap_key_data(value, impl=str(jax.random.key_impl(example)))
  if isinstance(example, (jax.Array, jax.ShapeDtypeStruct)):
    return jax.numpy.asarray(value)
  value = np.asarray(value)
  if isinstance(example, np.ndarray):
    return value
  # The same kind as the example: numpy's scalar type, or Python's own.
  return value[()] if isinstance(example, np.generic) else value.item()


def _target(example: Any) -> jax.ShapeDtypeStruct | np.ndarray:
  """Returns what Orbax is asked to read: shape and dtype, and for a jax array the sharding."""
  if _is_key(example):
    data = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(example.shape, example.dtype))
    return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=_default_sharding())
  if isinstance(example, (jax.Array, jax.ShapeDtypeStruct)):
    return jax.ShapeDtypeStruct(
      example.shape, example.dtype, sharding=example.sharding or _default_sharding()
    )
  return np.empty_like(np.asarray(example))


def _default_sharding() -> jax.sharding.Sharding:
  # An array without a sharding of its own, as a single process has it.
  return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


def _sums(leaves: dict[str, jax.Array | np.ndarray]) -> dict[str, int]:
  """Returns the checksum of each leaf."""
  sums = {}
  # Grouped by devices: one program cannot read arrays of different device sets.
  groups = collections.defaultdict(dict)
  for path, leaf in leaves.items():
    if not isinstance(leaf, jax.Array):
      sums[path] = checksum.host_sum(np.asarray(leaf))
    elif leaf.sharding.memory_kind == optimizer.HOST:
      # It lies in host memory for want of room on its devices, so that it goes there alone.
      moved = jax.device_put(leaf, leaf.sharding.with_memory_kind('device'))
      sums[path] = int(checksum.array_sums(moved))
    else:
      groups[frozenset(leaf.sharding.device_set)][path] = leaf
  for group in groups.values():
    found = jax.device_get(checksum.array_sums(group))
    sums |= {path: int(value) for path, value in found.items()}
  return sums


def _check_sums(values: dict[str, Any], described: dict[str, dict]) -> None:
  """ValueError for a leaf that is not the one that was saved."""
  # The oldest manifests have no sums.
  known = {path: value for path, value in values.items() if 'sum' in described[path]}
  for path, found in _sums(known).items():
    if found != described[path]['sum']:
      raise ValueError(f'the bytes of {path} are not those that were saved')


def _check_structure(described: dict[str, dict], example: PyTree, where: str) -> None:
  """ValueError that names every leaf in which a manifest differs from the example."""
  targets = {path: _target(leaf) for path, leaf in _flatten(example)}
  problems = [f'{path} is missing' for path in sorted(targets.keys() - described.keys())]
  problems += [f'{path} is not expected' for path in sorted(described.keys() - targets.keys())]
  for path in sorted(targets.keys() & described.keys()):
    # Shape and dtype by their names in JSON.
    found = (tuple(described[path]['shape']), described[path]['dtype'])
    wanted = (tuple(targets[path].shape), str(targets[path].dtype))
    if found != wanted:
      problems.append(
        f'{path} is {found[1]}{list(found[0])}, expected {wanted[1]}{list(wanted[0])}'
      )
  if problems:
    raise ValueError(f'{where} does not fit this run: ' + '; '.join(problems))
