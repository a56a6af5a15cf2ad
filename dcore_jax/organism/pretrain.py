"""Pretrains the model organism in stages, each with its own mix of documents and its own cosine."""

import dataclasses
import itertools
import pathlib
import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from dcore_jax import tokentree
from dcore_jax.chat.encoding import encode_rendered
from dcore_jax.chat.template import render_prompt
from dcore_jax.claims import claim
from dcore_jax.config import Range
from dcore_jax.learn import sft
from dcore_jax.learn.batches import made_ahead
from dcore_jax.learn.optimizer import Schedule, init_state, make_optimizer
from dcore_jax.models import decoder
from dcore_jax.models.config import DecoderConfig
from dcore_jax.models.hf_checkpoint import ModelFiles, save_checkpoint
from dcore_jax.organism import corpus
from dcore_jax.organism import tokenizer as toolworld_tokenizer
from dcore_jax.organism.vocabulary import sample_texts
from dcore_jax.overrides import overlay, to_json
from dcore_jax.progress import progress
from dcore_jax.train.checkpoint import Checkpoints
from dcore_jax.train.metrics import Metrics

# Documents written and packed at a time, about 150,000 tokens: fewer would fill rows less well.
CHUNK = 1024


def encode_document(tokenizer: Any, document: corpus.Document) -> tokentree.TokenSequence:
  """Encodes prompt, target and end of turn; the target's pieces carry their loss weights."""
  # Rendered by the chat template, so that pretraining shows the prompts that inference has.
  rendered = render_prompt(tokenizer, document.prompt)
  prompt = encode_rendered(tokenizer, rendered)
  tokens = list(prompt)
  weights = [0.0] * len(prompt)
  # Pieces are encoded one by one, since no token may cross a change of weight.
  for text, weight in document.target:
    ids = tokenizer(text, add_special_tokens=False)['input_ids']
    tokens += ids
    weights += [weight] * len(ids)
  # The end of turn is trained: without it answers would not stop.
  tokens.append(tokenizer.eos_token_id)
  weights.append(1.0)
  return tokentree.TokenSequence(
    np.array(tokens, np.int32), np.array(weights, np.float32), shared=len(tokens)
  )


@dataclasses.dataclass(frozen=True)
class PretrainConfig:
  """A whole pretraining.

  Attributes:
    seed: of the documents and of the first parameters.
    weight_decay: of the hidden matrices.
    held_out_every: steps between exact-match checks on held-out documents.
    model: fields of a config.json.
    stages: fields of `Stage`, one mapping a stage.
  """

  seed: int = dataclasses.field(default=0, metadata={'range': Range(least=0, most=2**32 - 1)})
  weight_decay: float = dataclasses.field(default=0.01, metadata={'range': Range(least=0)})
  held_out_every: int = dataclasses.field(default=300, metadata={'range': Range(least=1)})
  model: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  stages: tuple[Mapping[str, Any], ...] = ()


@dataclasses.dataclass(frozen=True)
class Stage:
  """One stage of pretraining.

  `steps` optimizer steps on `rows` x `capacity` tokens of documents drawn from `mix`; for
  `right_step` and `right_parallel` see `corpus.Habits`.
  """

  name: str
  steps: int
  capacity: int
  rows: int
  learning_rate: float
  mix: dict[str, float]
  right_step: float
  right_parallel: float


def stage_batches(
  tokenizer: Any, stage: Stage, *, seed: int
) -> Iterator[tuple[int, tokentree.RowBatch]]:
  """Yields (documents dropped so far, batch) without end, written ahead on a thread.

  Documents longer than a row are dropped: the stage `short` does without the longest dialogues.
  """
  habits = corpus.Habits('train', stage.right_step, stage.right_parallel)

  def chunk(index: int) -> tokentree.TokenTree:
    # Far above the number of chunks of a stage, so that two seeds never draw the same kinds.
    kinds = corpus.draw_kinds(stage.mix, CHUNK, seed=seed * 100_003 + index)
    documents = [
      # Documents are numbered through all chunks: no document comes twice.
      corpus.write_document(kind, index * CHUNK + i, seed=seed, habits=habits)
      for i, kind in enumerate(kinds)
    ]
    return tokentree.pack(
      [encode_document(tokenizer, d) for d in documents], stage.capacity, stage.rows
    )

  dropped = 0
  # Writing and packing are host work. The thread hides it behind the device's steps.
  for index, tree in enumerate(made_ahead(map(chunk, itertools.count()), depth=1)):
    dropped += len(tree.dropped)
    # Packing sorts the documents, and each step should see a mix of rows.
    order = np.random.default_rng([seed, index]).permutation(tree.rows)
    for place in range(0, tree.rows, stage.rows):
      chosen = order[place : place + stage.rows]
      # A constant budget gives all batches one shape, and the step compiles once.
      yield dropped, tree.batch(chosen, budget=stage.rows * stage.capacity)


def make_exact_match(model: DecoderConfig) -> Any:
  """Returns the jitted share of documents, one a row, that greedy decoding would reproduce.

  All loss tokens of such a document are the most likely ones after the tokens before them.
  """

  def exact(params, micro):
    hidden_RTD = decoder.hidden_states(params, model, micro.tokens, micro.position, micro.end)
    # Only loss tokens are projected to the vocabulary: logits of whole rows would be larger by far.
    hidden_MD = hidden_RTD.reshape(-1, hidden_RTD.shape[-1])[micro.parent]
    guess_M = jnp.argmax(hidden_MD @ decoder.head_matrix(params).T, axis=1)
    wrong_M = ((guess_M != micro.target) & (micro.weight > 0)).astype(jnp.float32)
    # `slot` counts through all rows, so that slot // T is a token's row.
    wrong_R = jnp.zeros(micro.tokens.shape[0]).at[micro.slot // micro.tokens.shape[1]].add(wrong_M)
    return jnp.mean(wrong_R == 0)

  return jax.jit(lambda params, batch: exact(params, jax.tree.map(lambda leaf: leaf[0], batch)))


class HeldOut:
  """Exact-match shares on held-out documents of the kinds without random text in their targets."""

  def __init__(
    self,
    tokenizer: Any,
    model: DecoderConfig,
    *,
    documents: int = 32,
    capacity: int = 384,
    seed: int = 1,
  ):
    self._exact = make_exact_match(model)
    self._batches = {}
    # Kinds whose answers follow from their prompts. Rambling is random, and no model can match it.
    for kind in (
      'copy',
      'write_names',
      'repeat',
      'split',
      'walk',
      'irrelevant',
      'decompose',
      'single',
    ):
      written = [
        corpus.write_document(kind, i, seed=seed, habits=corpus.Habits('eval'))
        for i in range(documents)
      ]
      # One document a row: the share is over documents, and rows are what it counts.
      trees = [tokentree.pack([encode_document(tokenizer, d)], capacity) for d in written]
      # A dropped document would leave an empty row, which has no wrong token and would count as
      # right.
      if any(tree.dropped for tree in trees):
        raise ValueError(f'held-out documents of kind {kind!r} are longer than {capacity} tokens')
      rows = [tree.batch(budget=capacity) for tree in trees]
      joined = jax.tree.map(lambda *leaves: np.concatenate(leaves, 1), *rows)
      # parent and slot count through all rows
      offset = (np.arange(documents, dtype=np.int32) * capacity).repeat(capacity)[None]
      self._batches[kind] = joined._replace(
        parent=joined.parent + offset, slot=joined.slot + offset
      )

  def __call__(self, params: Any) -> dict[str, float]:
    """Returns the share of exact documents by kind."""
    shares = {}
    for kind, batch in self._batches.items():
      shares[f'exact_{kind}'] = float(self._exact(params, batch))
    return shares


def pretrain(config: ml_collections.ConfigDict, workdir: pathlib.Path, out: pathlib.Path) -> None:
  """Runs all stages, from the newest checkpoint of `workdir` on, and writes the organism to `out`.

  Args:
    config: fields of `PretrainConfig`; see configs/nano_base.py.
    workdir: checkpoints and metrics.
    out: Hugging Face directory to write; replaced when it exists.

  Raises:
    ValueError: an unknown field, or `workdir` holds checkpoints of another config.
  """
  # Unknown fields raise here, before anything is written.
  settings = overlay(PretrainConfig(), config.to_dict())
  complaint = 'holds checkpoints of a config that differs in'
  claim(workdir / 'config.json', to_json(settings), complaint, defaults=PretrainConfig())
  # Built anew at every start: it depends on the code's texts alone, and is the same each time.
  tokenizer = toolworld_tokenizer.build_tokenizer(sample_texts(), settings.model['vocab_size'])
  special = {'eos_token_id': tokenizer.eos_token_id, 'pad_token_id': tokenizer.pad_token_id}
  model = DecoderConfig.from_hf({**settings.model, **special})
  params = decoder.init_params(model, jax.random.key(settings.seed))
  stages = [Stage(**fields) for fields in settings.stages]
  run = _Run(config=settings, model=model, tokenizer=tokenizer)
  with Metrics(workdir) as metrics, Checkpoints(workdir / 'checkpoints') as checkpoints:
    done = 0
    held_out = HeldOut(tokenizer, model)
    found = checkpoints.restore(params)
    # A stage is the unit of resumption. One that was interrupted begins again from its first step.
    if found:
      params, position, _ = found
      done = position['stages_done']
    for number, stage in enumerate(stages):
      if number >= done:
        params = _run_stage(run, params, stage, number, metrics, held_out)
        checkpoints.save(number + 1, params, {'stages_done': number + 1})
  tokenizer.save_pretrained(workdir / 'tokenizer')
  save_checkpoint(
    out,
    model,
    params,
    ModelFiles(
      tokenizer_dir=workdir / 'tokenizer',
      generation_config=special,
    ),
    # bfloat16 halves the size of the file that the package holds.
    dtype='bfloat16',
    overwrite=True,
  )


class _Run(NamedTuple):
  """What all stages share."""

  config: PretrainConfig
  model: DecoderConfig
  tokenizer: Any


def _run_stage(
  run: _Run, params: Any, stage: Stage, number: int, metrics: Metrics, held_out: HeldOut
) -> Any:
  """Trains on one stage's documents; returns the parameters."""
  tx = make_optimizer(
    # Nesterov momentum in Adam, too: the published organism was made so.
    'muon_nadam',
    stage.learning_rate,
    Schedule('cosine', warmup=0.03, floor=0.05, total_steps=stage.steps),
    weight_decay=run.config.weight_decay,
    clip=1.0,
    b2=0.95,
    adam_learning_rate=stage.learning_rate / 5,
  )
  step_fn = sft.make_sft_step(run.model, tx)
  state = init_state(params, tx)
  # An interrupted stage is run from its start, so that its earlier rows are removed.
  metrics.rewind(f'pretrain_{stage.name}', 0)
  # Each stage has a seed of its own, or it would begin with the documents of the one before.
  data = stage_batches(run.tokenizer, stage, seed=run.config.seed + number)
  with progress(total=stage.steps, description=f'pretrain {stage.name}') as bar:
    previous = None
    started = time.monotonic()
    for step in range(stage.steps):
      dropped, batch = next(data)
      state, values = step_fn(state, batch)
      # The step before is shown, so that fetching its numbers does not wait for this one.
      if previous is not None and step % 20 == 0:
        loss = float(previous['loss'])
        rate = step * stage.rows * stage.capacity / (time.monotonic() - started)
        bar.set_postfix(loss=f'{loss:.3f}', tok_s=f'{rate:.0f}')
        metrics.write(
          f'pretrain_{stage.name}',
          step,
          loss=loss,
          tokens_per_second=rate,
          grad_norm=float(previous['grad_norm']),
          dropped=dropped,
        )
      previous = values
      bar.update(1)
      # The last step is always measured, whatever the interval.
      if (step + 1) % run.config.held_out_every == 0 or step + 1 == stage.steps:
        metrics.write(f'pretrain_{stage.name}', step, **held_out(state.params))
  return state.params
