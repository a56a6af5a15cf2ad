"""The SFT step: work saved by token trees, time against transformers + torch, memory, scaling.

    python -m benchmarks.sft_step    # every case, about 25 minutes on 2 cores
    python -m benchmarks.sft_step --cases=work,memory

One JSON line a case: ours, peer, ratio (> 1: ours is better), bound. Rows are real ones
(`DCORE_DATA`) and the vocabulary is Qwen3's; the model has random weights, since time does not
depend on them. Bounds are the multiply-adds of the step at the rate of one large matrix product on
this machine.
"""

import functools
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import transformers
from absl import app, flags

from benchmarks import measure, rows
from benchmarks.measure import line, say
from dcore_jax import tokentree
from dcore_jax.files import data_path
from dcore_jax.learn import head, optimizer, sft
from dcore_jax.learn.step import loss_token_states
from dcore_jax.models import decoder, hf_checkpoint
from dcore_jax.models.attention import tree_attention, tree_blocks
from dcore_jax.models.config import DecoderConfig
from dcore_jax.models.decoder import Execution
from dcore_jax.rollout.policy import ORGANISM
from dcore_jax.train.throughput import matmul_rate

MODEL = DecoderConfig(
  vocab_size=151_936,
  hidden_size=512,
  intermediate_size=1536,
  num_hidden_layers=8,
  num_attention_heads=8,
  num_key_value_heads=4,
  head_dim=64,
  tie_word_embeddings=True,
)
LEARNING_RATE = 1e-5
CASES = ('work', 'packing', 'time', 'plain', 'attention', 'head', 'memory', 'scaling')
_CASES = flags.DEFINE_list('cases', list(CASES), f'Which of {", ".join(CASES)} to run.')
_ROUNDS = flags.DEFINE_integer(
  'rounds', 3, 'Interleaved rounds of the timed cases; medians are printed.'
)


def qwen_tokenizer():
  """The tokenizer of Qwen3."""
  return transformers.AutoTokenizer.from_pretrained(str(data_path('qwen3-tokenizer')))


def step_flops(tree: tokentree.TokenTree, block: int = 256) -> float:
  """Operations of forward and backward pass: layers on every place of the rows, attention on the
  visible blocks, head on loss tokens.
  """
  matmul = 2 * (MODEL.flops_per_token(0) / 2 - MODEL.vocab_size * MODEL.hidden_size)
  pairs = (
    float(tree_blocks.visible_blocks(tree.end, block, block).sum()) * block**2
    if tree.capacity % block == 0
    else 0
  )
  attention = 4 * MODEL.num_hidden_layers * MODEL.num_attention_heads * MODEL.head_dim * pairs
  loss_tokens = np.count_nonzero(tree.weight)
  return 3 * (
    matmul * tree.tokens.size + attention + 2 * MODEL.vocab_size * MODEL.hidden_size * loss_tokens
  )


class Ours:
  """Our SFT step on one fixed batch; a call runs it and returns the loss."""

  def __init__(self, params: decoder.Params, tree: tokentree.TokenTree, parts: int = 1):
    self._tx = optimizer.make_optimizer('adamw', LEARNING_RATE)
    self._step = sft.make_sft_step(MODEL, self._tx)
    self._batch = tree.batch(accumulate=parts)
    self._state = optimizer.init_state(jax.tree.map(jnp.array, params), self._tx)

  def __call__(self) -> jax.Array:
    """Makes one step; returns the loss."""
    self._state, metrics = self._step(self._state, self._batch)
    return metrics['loss']


class Torch:
  """transformers' Qwen3 on the flat sequences, `micro` at a time padded to their longest, loss by
  its own `labels`.

  `spare_head` is a stronger form than the usual one: the vocabulary projection for loss tokens
  only.
  """

  def __init__(
    self,
    params: decoder.Params,
    sequences: Sequence[tokentree.TokenSequence],
    micro: int,
    *,
    spare_head: bool = False,
  ):
    import torch

    self._torch = torch
    self._sequences = sequences
    self._micro = micro
    self._spare_head = spare_head
    with tempfile.TemporaryDirectory() as folder:
      hf_checkpoint.save_checkpoint(f'{folder}/model', MODEL, params)
      self._model = transformers.AutoModelForCausalLM.from_pretrained(
        f'{folder}/model', dtype=torch.float32
      )
    self._model.train()
    self._optimizer = torch.optim.AdamW(
      self._model.parameters(), LEARNING_RATE, weight_decay=0.0, fused=True
    )
    self._weight = float(sum(sequence.weights.sum() for sequence in sequences))

  def _pad(self, longest: int, rows: list[np.ndarray], fill: int) -> Any:
    padded = [np.pad(row, (0, longest - len(row)), constant_values=fill) for row in rows]
    return self._torch.tensor(np.stack(padded))

  def __call__(self) -> float:
    """Makes one step; returns the loss."""
    torch = self._torch
    total = 0.0
    self._optimizer.zero_grad()
    for start in range(0, len(self._sequences), self._micro):
      part = self._sequences[start : start + self._micro]
      pad = functools.partial(self._pad, max(len(sequence.tokens) for sequence in part))
      tokens = pad([s.tokens.astype(np.int64) for s in part], 0)
      mask = pad([np.ones(len(s.tokens), np.int64) for s in part], 0)
      labels = pad([np.where(s.weights > 0, s.tokens, -100).astype(np.int64) for s in part], -100)
      if self._spare_head:
        hidden = self._model.model(
          input_ids=tokens, attention_mask=mask, use_cache=False
        ).last_hidden_state
        trained = labels[:, 1:] != -100
        logits = self._model.lm_head(hidden[:, :-1][trained])
        loss = (
          torch.nn.functional.cross_entropy(logits, labels[:, 1:][trained], reduction='sum')
          / self._weight
        )
      else:
        loss = self._model(
          input_ids=tokens,
          attention_mask=mask,
          labels=labels,
          use_cache=False,
          num_items_in_batch=torch.tensor(self._weight),
        ).loss
      loss.backward()
      total += loss.item()
    torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
    self._optimizer.step()
    return total


# --- cases ----------------------------------------------------------------------------------------


def work() -> None:
  """Tokens that trees do not compute twice."""
  tokenizer = qwen_tokenizer()
  dialogues = rows.airline(tokenizer, 60)
  small = rows.toolworld(transformers.AutoTokenizer.from_pretrained(str(ORGANISM)), 60)
  for name, group, capacity, wanted in (
    ('airline', dialogues, 16384, 5.6),
    ('toolworld', small, 4096, None),
  ):
    sequences = [sequence for dialogue in group for sequence in dialogue]
    tree = tokentree.pack(sequences, capacity)
    flat = tokentree.pack(sequences, capacity, merge=False)
    unique = tokentree.pack(sequences, 10**7).live  # in one row nothing is repeated
    line(
      f'work saved, {name}, rows of {capacity}',
      'flat sequences',
      tree.live,
      sum(len(s.tokens) for s in sequences),
      'tokens',
      wanted=wanted,
      bound=unique,
      rows=tree.rows,
      flat_rows=flat.rows,
      occupancy=tree.live / tree.tokens.size,
    )


def packing() -> None:
  """Speed and occupancy of the packer on the host."""
  rng = np.random.default_rng(0)

  def draw(size):
    return rng.integers(0, 150_000, size).astype(np.int32)

  def weights(size, trained):
    return (np.arange(size) >= size - trained).astype(np.float32)

  single = [
    tokentree.TokenSequence(draw(n), weights(n, n // 2), n)
    for n in np.clip(rng.lognormal(7, 0.7, 2000), 50, 8000).astype(int)
  ]
  groups = []
  for _ in range(256):
    prompt = draw(1024)
    for size in rng.integers(256, 512, 8):
      groups.append(
        tokentree.TokenSequence(
          np.concatenate([prompt, draw(size)]), weights(1024 + size, size), 1024
        )
      )
  airline = [sequence for dialogue in rows.airline(qwen_tokenizer(), 60) for sequence in dialogue]
  for name, sequences in (
    ('log-normal single turns', single),
    ('256 groups of 8', groups),
    ('airline turns', airline),
  ):
    pack = functools.partial(tokentree.pack, sequences, 16384)
    tree = pack()
    seconds = measure.interleaved({'pack': pack}, rounds=5)['pack']
    line(
      f'packing, {name}',
      '',
      tree.live / seconds,
      2e6,
      'tree tokens/s',
      wanted=1,
      better='more',
      dedup=tree.dedup,
      occupancy=tree.live / tree.tokens.size,
    )


def _timed(
  case: str,
  params: decoder.Params,
  sequences: list[tokentree.TokenSequence],
  capacity: int,
  micro: int,
  wanted: tuple[float | None, float | None],
  *,
  with_torch: bool = True,
) -> None:
  """One batch of rows as a tree, flat, and in torch twice; all must give the same loss."""
  rate = matmul_rate('float32')
  tree = tokentree.pack(sequences, capacity)
  flat = tokentree.pack(sequences, capacity, merge=False)
  runs: dict[str, Callable] = {
    'tree': Ours(params, tree, tree.rows),
    'flat': Ours(params, flat, flat.rows),
  }
  if with_torch:
    try:
      runs |= {
        'torch': Torch(params, sequences, micro),
        'spare': Torch(params, sequences, micro, spare_head=True),
      }
    except ImportError:
      measure.skipped(case, 'transformers + torch', 'torch is not installed')
  losses = {name: float(run()) for name, run in runs.items()}
  say(f'{case}: losses {losses}')
  for name, loss in losses.items():
    if abs(loss - losses['tree']) > 1e-4:
      raise AssertionError(f'{case}: {name} has loss {loss}, the tree {losses["tree"]}')
  seconds = measure.interleaved(runs, _ROUNDS.value, warm=0)
  tokens = sum(len(sequence.tokens) for sequence in sequences)
  facts = dict(
    flat_tokens=tokens,
    tree_tokens=tree.live,
    loss_tokens=int(sum(np.count_nonzero(s.weights) for s in sequences)),
    bound=step_flops(tree) / rate,
  )
  peers = {
    'flat': 'our flat packing',
    'torch': 'transformers + torch',
    'spare': 'torch, head on loss tokens only',
  }
  for (name, peer), wish in zip(peers.items(), (wanted[0], wanted[1], None), strict=True):
    if name in seconds:
      line(case, peer, seconds['tree'], seconds[name], 's/step', wanted=wish, **facts)


def _params() -> decoder.Params:
  return jax.jit(decoder.init_params, static_argnums=0)(MODEL, jax.random.key(0))


def time() -> None:
  """Turns of one dialogue, as they share their history.

  8 of them, and 12, which is nearer the mean of 13.
  """
  dialogues = rows.airline(qwen_tokenizer(), 9)
  _timed('time, 8 airline turns', _params(), dialogues[8], 4096, 2, (2, 3))
  _timed('time, 12 airline turns', _params(), dialogues[4], 8192, 2, (2, None), with_torch=False)


def plain() -> None:
  """Single turns that share nothing: matrix products alone."""
  _timed('time, single turns', _params(), rows.single_turn(qwen_tokenizer(), 8), 4096, 4, (None, 1))


def attention_case() -> None:
  """Forward and backward of one layer's attention: against the whole score matrix, and what skipped
  blocks save.
  """
  heads = (MODEL.num_attention_heads, MODEL.num_key_value_heads)
  H = MODEL.head_dim
  rate = matmul_rate('float32')

  def runs(T, ends, implementations):
    def draw(index, count):
      return jax.random.normal(jax.random.key(index), (1, T, count, H))

    q = draw(0, heads[0])
    k = draw(1, heads[1])
    v = draw(2, heads[1])
    bar = draw(3, heads[0])

    def gradient(name):
      return jax.jit(
        lambda q, k, v, end, bar: jax.vjp(
          lambda *qkv: tree_attention.attend(*qkv, end, name), q, k, v
        )[1](bar)
      )

    return {
      (name, tree): functools.partial(gradient(name), q, k, v, jnp.asarray(end), bar)
      for name in implementations
      for tree, end in ends.items()
    }

  for T in (1024, 4096, 16384):
    causal = np.full((1, T), T, np.int32)
    branches = causal.copy()  # a trunk of a quarter of the row and 8 branches
    for begin in range(T // 4, T, 3 * T // 32):
      branches[:, begin : begin + 3 * T // 32] = begin + 3 * T // 32
    ends = {'causal': causal, 'tree': branches}
    seconds = measure.interleaved(
      runs(T, ends, ['blockwise'] if T > 4096 else ['blockwise', 'reference']), _ROUNDS.value
    )
    flops = {
      name: 4 * 3.5 * heads[0] * H * float(tree_blocks.visible_blocks(end, 256, 256).sum()) * 256**2
      for name, end in ends.items()
    }
    for tree in ends:
      line(
        f'attention, {T} tokens, {tree}',
        'the whole score matrix',
        seconds['blockwise', tree],
        seconds.get(('reference', tree)),
        's',
        bound=flops[tree] / rate,
      )
    line(
      f'attention, {T} tokens, skipped blocks',
      'a causal row',
      seconds['blockwise', 'tree'],
      seconds['blockwise', 'causal'],
      's',
      flops_ratio=flops['causal'] / flops['tree'],
    )


def head_case() -> None:
  """Loss and gradient of the vocabulary projection against the materialised form."""
  D = MODEL.hidden_size
  V = MODEL.vocab_size

  def nll(logp, _, weight):
    return (-jnp.sum(weight * logp), ())

  def fused(targets, weight, h, w):
    return head.token_loss(nll, h, w, targets, weight)[0]

  def scored(targets, weight, h, w):
    del weight
    return -head.log_probs_and_entropy(h, w, targets)[0].sum()

  def whole(targets, weight, h, w):
    del weight
    return -jnp.take_along_axis(jax.nn.log_softmax(h @ w.T), targets[:, None], axis=1).sum()

  for M in (256, 1024, 4096):
    hidden, head_VD = (
      jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(((M, D), (V, D)))
    )
    targets = jax.random.randint(jax.random.key(2), (M,), 0, V)
    weight = jnp.ones(M)
    compiled = {}
    for name, loss in (('fused', fused), ('scored', scored), ('whole', whole)):
      step = jax.jit(jax.value_and_grad(functools.partial(loss, targets, weight), (0, 1)))
      compiled[name] = step.lower(hidden, head_VD).compile()
    temp = {name: c.memory_analysis().temp_size_in_bytes / 2**20 for name, c in compiled.items()}
    labels = {'fused': 'token_loss', 'scored': 'log_probs_and_entropy'}
    if M <= 1024:  # the plain form takes 14 GiB beyond
      seconds = measure.interleaved(
        {name: functools.partial(c, hidden, head_VD) for name, c in compiled.items()}, _ROUNDS.value
      )
      bound = 6 * M * D * V / matmul_rate('float32')
      for name, label in labels.items():
        line(
          f'head, {label}, {M} tokens',
          'materialised logits',
          seconds[name],
          seconds['whole'],
          's',
          wanted=1,
          bound=bound,
        )
    for name, label in labels.items():
      line(
        f'head, {label}, {M} tokens, temporaries',
        'materialised logits',
        temp[name],
        temp['whole'],
        'MiB',
        wanted=10 if M == 4096 else None,
      )


def memory() -> None:
  """Temporaries of the compiled step on one row of 16,384 tokens, a quarter of them trained."""
  T = 16384
  M = 4096

  def shape(*dims):
    return jax.ShapeDtypeStruct(dims, jnp.int32)

  weight = jax.ShapeDtypeStruct((1, M), jnp.float32)
  batch = tokentree.RowBatch(
    shape(1, 1, T),
    shape(1, 1, T),
    shape(1, 1, T),
    shape(1, M),
    shape(1, M),
    shape(1, M),
    weight,
    {},
  )
  abstract = jax.tree.map(
    lambda spec: jax.ShapeDtypeStruct(spec.shape, spec.dtype), decoder.abstract_params(MODEL)
  )

  def loss_whole(execution):
    def loss(params, batch):
      micro = jax.tree.map(lambda leaf: leaf[0], batch)
      hidden_MD = loss_token_states(params, MODEL, micro, execution)
      log_p = jax.nn.log_softmax(hidden_MD @ decoder.head_matrix(params).T)
      return -jnp.sum(
        micro.weight * jnp.take_along_axis(log_p, micro.target[:, None], axis=1)[:, 0]
      )

    return loss

  def temporaries(function):
    return (
      jax.jit(function).lower(abstract, batch).compile().memory_analysis().temp_size_in_bytes
      / 2**20
    )

  for remat in ('none', 'full'):  # 'full' scans the layers in either
    step = sft.make_sft_step(MODEL, optax.sgd(1.0), Execution(remat=remat))
    state = jax.eval_shape(lambda p: optimizer.init_state(p, optax.sgd(1.0)), abstract)
    ours = step.lower(state, batch).compile().memory_analysis().temp_size_in_bytes / 2**20
    theirs = temporaries(jax.grad(loss_whole(Execution(attention='reference', remat=remat))))
    line(
      f'temporaries of a step, 1 x {T} tokens, {M} trained, remat {remat}',
      'materialised logits and attention',
      ours,
      theirs,
      'MiB',
    )


def scaling() -> None:
  """Seconds per 1,000 useful tokens (those of the unmerged rows) as rows and turns grow."""
  params = _params()
  rng = np.random.default_rng(0)
  rate = matmul_rate('float32')

  def draw(size):
    return rng.integers(0, 150_000, size).astype(np.int32)

  for T in (2048, 4096, 8192, 16384):
    tree = tokentree.pack(
      [tokentree.TokenSequence(draw(T), (np.arange(T) >= T - 256).astype(np.float32), T)], T
    )
    seconds = measure.interleaved({'step': Ours(params, tree)}, _ROUNDS.value)['step']
    line(
      f'scaling, one row of {T}',
      '',
      1000 * seconds / T,
      None,
      's/1000 useful tokens',
      bound=1000 * step_flops(tree) / rate / T,
    )
  for turns in (1, 2, 4, 8, 16):
    history = draw(1200)
    sequences = []
    for _ in range(turns):
      row = np.concatenate([history, draw(150)])
      sequences.append(
        tokentree.TokenSequence(
          row, (np.arange(len(row)) >= len(history)).astype(np.float32), len(row)
        )
      )
      history = np.concatenate([history, draw(100)])
    useful = sum(len(sequence.tokens) for sequence in sequences)
    tree = tokentree.pack(sequences, -(-tokentree.pack(sequences, 10**5).live // 256) * 256)
    seconds = measure.interleaved({'step': Ours(params, tree)}, _ROUNDS.value)['step']
    line(
      f'scaling, {turns} turns',
      '',
      1000 * seconds / useful,
      None,
      's/1000 useful tokens',
      dedup=tree.dedup,
      bound=1000 * step_flops(tree) / rate / useful,
    )


def main(_) -> None:
  """Runs the cases that are asked for."""
  unknown = sorted(set(_CASES.value) - set(CASES))
  if unknown:
    raise app.UsageError(f'unknown cases {unknown}; known are {CASES}')
  cases = dict(
    zip(
      CASES, (work, packing, time, plain, attention_case, head_case, memory, scaling), strict=True
    )
  )
  for name in CASES:
    if name in _CASES.value:
      say(f'--- {name}')
      cases[name]()


if __name__ == '__main__':
  app.run(main)
