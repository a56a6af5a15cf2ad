"""New weights for a server that goes on serving: POST /update_weights.

    {"path": "v7", "version": 7}

The path is that of a Hugging Face directory, below the one that the server was told. Its tensors
are read beside the engine's thread, which goes on meanwhile, and are exchanged between two steps.
Requests in flight go on under the new weights (`Engine.exchange`); with `return_token_ids` an
answer says for each token which version drew it.
"""

import asyncio
import pathlib
import time
from typing import Any

import jax
import pydantic
from pydantic import Field

from dcore_jax.models import decoder, presets
from dcore_jax.models.hf_checkpoint import load_config, load_params
from dcore_jax.rollout.engine import Engine
from dcore_jax.serve.errors import Refusal
from dcore_jax.serve.parts import RequestError
from dcore_jax.serve.scheduler import Scheduler

UPDATE_PATH = '/update_weights'


class WeightUpdate(pydantic.BaseModel):
  """What is asked for: a directory, and the number of its weights (by default the next one)."""

  model_config = pydantic.ConfigDict(extra='forbid')

  path: str = Field(min_length=1, max_length=4096)
  version: int | None = Field(None, ge=0, lt=2**31)


def read_update(body: bytes) -> WeightUpdate:
  """Returns the body as an update.

  Raises:
    RequestError: with the first field that is wrong.
  """
  try:
    return WeightUpdate.model_validate_json(body)
  except pydantic.ValidationError as error:
    problem = error.errors(include_url=False)[0]
    place = '.'.join(map(str, problem['loc']))
    raise RequestError(f'{place or "the body"}: {problem["msg"]}', place or None) from error


class WeightUpdates:
  """Takes new weights for one engine, one update at a time.

  Args:
    scheduler: runs the engine.
    root: the directory below which weights may lie; None takes none.
  """

  def __init__(self, scheduler: Scheduler, root: pathlib.Path | None):
    self._scheduler = scheduler
    self._root = root.resolve() if root else None
    self._under_way = False

  async def take(self, update: WeightUpdate) -> dict[str, Any]:
    """Loads a checkpoint and exchanges the weights for it.

    Returns:
      What the answer says: the version, and the seconds of loading and of waiting for the engine.

    Raises:
      Refusal: updates are not allowed here, or another one is under way.
      RequestError: a path that leads elsewhere, or a checkpoint that is not one of this model.
    """
    if self._root is None:
      raise Refusal(403, 'this server takes no weights; start it with --weights_dir')
    # Two copies of the weights are held as it is; a third may not fit.
    if self._under_way:
      raise Refusal(409, 'another update of the weights is under way', headers={'Retry-After': '1'})
    self._under_way = True
    try:
      began = time.monotonic()
      folder = self._folder(update.path)
      try:
        params = await asyncio.to_thread(load_beside, folder, self._scheduler.engine)
        loaded = time.monotonic()
        version = self._scheduler.version + 1 if update.version is None else update.version
        await asyncio.wrap_future(self._scheduler.exchange(params, version))
      except (ValueError, OSError) as error:
        raise RequestError(f'path: {error}', 'path') from error
      # Of the caller's directory on the server: no other client sees this answer.
      return {
        'version': version,
        'path': str(folder),
        'seconds_load': round(loaded - began, 3),
        'seconds_exchange': round(time.monotonic() - loaded, 3),
      }
    finally:
      self._under_way = False

  def _folder(self, path: str) -> pathlib.Path:
    """Returns the directory that is meant, wherever links lead."""
    try:
      # An absolute path takes the place of the root, and is then looked for below it.
      folder = (self._root / path).resolve()
      inside = folder.is_relative_to(self._root) and folder.is_dir()
    except (OSError, ValueError, RuntimeError):  # too long, with a NUL, or links in a circle
      inside = False
    if not inside:
      # The same words whatever is there: nobody learns what lies outside.
      raise RequestError(f'path: there is no {path!r} below the directory of weights', 'path')
    return folder


def load_beside(folder: pathlib.Path, engine: Engine) -> decoder.Params:
  """Loads weights for an engine that is running, in its dtype, into the memory of the host.

  An accelerator has no room for two copies of a large model; the engine lets its old weights go
  before it moves these to their places.

  Raises:
    ValueError: the directory holds another model, or one that is damaged.
  """
  # The shapes may agree where the function does not, for example with another base of RoPE.
  if not presets.same_model(load_config(folder), engine.config):
    raise ValueError(f'{folder.name!r} does not hold the model that is served')
  try:
    host = jax.sharding.SingleDeviceSharding(jax.local_devices(backend='cpu')[0])
  except RuntimeError:
    # jax was told to have no CPU (JAX_PLATFORMS): what there is has to hold both copies.
    host = None
  held = engine.params
  placed = jax.tree.map(lambda _: host, held) if host else None
  return load_params(folder, held['embed'].dtype, shardings=placed)[1]
