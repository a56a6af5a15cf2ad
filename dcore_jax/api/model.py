"""Loads a model by name, asks it for logits or answers, and saves it."""

import dataclasses
import difflib
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from dcore_jax import distributed
from dcore_jax.chat.encoding import encode_rendered
from dcore_jax.chat.messages import Message, ToolCall, ToolSpec
from dcore_jax.chat.template import render_records
from dcore_jax.chat.thoughts import opened_thoughts
from dcore_jax.chat.tool_specs import read_tools
from dcore_jax.config import ModelSection
from dcore_jax.models.config import DecoderConfig
from dcore_jax.models.decoder import Params
from dcore_jax.models.hf_checkpoint import ModelFiles, save_checkpoint
from dcore_jax.models.module import Decoder
from dcore_jax.progress import show_compiling
from dcore_jax.rollout.engine import Engine
from dcore_jax.rollout.model_folders import find_model_folder
from dcore_jax.rollout.policy import find_stop_ids, load_policy
from dcore_jax.rollout.requests import Completion, Request
from dcore_jax.rollout.sampling import SamplingParams
from dcore_jax.rollout.sizes import EngineSizes
from dcore_jax.run.export import generation_config
from dcore_jax.serve.replies import ReplyParser

Conversation = str | Sequence[Message | dict[str, Any]]

# What Qwen3 recommends for thinking.
SAMPLING = {'temperature': 0.6, 'top_p': 0.95, 'top_k': 20}
_LANES = 8  # answers sampled at once; memory is set aside for all of them
_MOST_TOKENS = 4096  # of prompt and answer, where the model has more positions, for the same reason


@dataclasses.dataclass(frozen=True)
class Answer:
  """The answer of a model to one conversation.

  Attributes:
    content: the text, without thoughts and calls.
    reasoning: what stood in the `<think>` block; '' where there was none.
    calls: calls of the tools that were given; what cannot be read as a call stays in `content`.
    finished: the model ended its turn, or wrote a stop string; else its budget was used up.
    prompt_tokens: tokens of the prompt.
    completion_tokens: tokens that were sampled.
  """

  content: str
  reasoning: str
  calls: tuple[ToolCall, ...]
  finished: bool
  prompt_tokens: int
  completion_tokens: int

  def to_message(self) -> dict[str, Any]:
    """Returns the answer as a message, to be put at the end of the conversation."""
    # OpenAI's names, so that the message can be sent to a server or rendered by a template.
    message: dict[str, Any] = {'role': 'assistant', 'content': self.content}
    if self.reasoning:
      message['reasoning_content'] = self.reasoning
    if self.calls:
      message['tool_calls'] = [_call_record(call) for call in self.calls]
    return message


class Model(Decoder):
  """A decoder with its tokenizer: an `nnx.Module` that answers.

  `model(tokens_BT)` gives logits [B, T, V]. Flax's tools work on it as on any module; copies that
  `nnx.merge` makes share its rollout engine, which takes their weights when they are asked.

  Args:
    config: the architecture.
    params: its parameters.
    tokenizer: a transformers tokenizer with a chat template.
    folder: the Hugging Face directory of the tokenizer and of generation_config.json.
  """

  def __init__(
    self, config: DecoderConfig, *, params: Params, tokenizer: Any, folder: pathlib.Path
  ):
    super().__init__(config, params=params)
    # What is no array is static to Flax: a part of the module's structure, compared by identity.
    self.tokenizer = tokenizer
    self.folder = folder
    self._answering = _Answering()

  def generate(
    self,
    messages: Conversation,
    *,
    tools: Sequence[ToolSpec | dict[str, Any]] = (),
    max_tokens: int | None = None,
    temperature: float = SAMPLING['temperature'],
    seed: int = 0,
    **truncation: Any,
  ) -> Answer:
    """Answers one conversation; see `dcore_jax.generate`, which answers many at once."""
    [answer] = generate(
      self,
      [messages],
      tools=tools,
      max_tokens=max_tokens,
      temperature=temperature,
      seed=seed,
      **truncation,
    )
    return answer

  def save(
    self, directory: str | pathlib.Path, *, dtype: str = 'bfloat16', overwrite: bool = False
  ) -> None:
    """Writes a Hugging Face directory, tokenizer included, which `load` and transformers read.

    Args:
      directory: the target.
      dtype: 'bfloat16' or 'float32', of every tensor.
      overwrite: allows to replace a non-empty directory.

    Raises:
      ValueError: another dtype.
      FileExistsError: a non-empty target without `overwrite`.
    """
    save_checkpoint(
      directory,
      self.config,
      self.params(),
      ModelFiles(
        tokenizer_dir=self.folder,
        generation_config=generation_config(self.folder, self.config, self.tokenizer),
      ),
      dtype=dtype,
      overwrite=overwrite,
    )

  def with_params(self, params: Params) -> 'Model':
    """Returns a model with other parameters; this one is left as it is."""
    return Model(self.config, params=params, tokenizer=self.tokenizer, folder=self.folder)


class _Answering:
  """A model's rollout engine, made at the first question.

  An object of its own, and a static one, since an engine is no part of a module's state: it may
  come into being without making any function that was compiled for the module stale.
  """

  def __init__(self):
    self._engine: Engine | None = None
    self._weights: list[jax.Array] = []

  def engine(self, model: Model) -> Engine:
    """Returns the engine with the weights that the model has now."""
    # An update casts and places all weights, seconds for 8B: not at every question.
    weights = jax.tree.leaves(model.params())
    if self._engine is None:
      self._engine = make_engine(model, lanes=_LANES)
      show_compiling(self._engine.prepare)
    # Arrays never change, so that weights are the engine's own if the arrays are.
    elif any(new is not old for new, old in zip(weights, self._weights, strict=True)):
      self._engine.update(model.params())
    # Held, and not only compared by id: a freed array's id may be given to a new one.
    self._weights = weights
    return self._engine


def load(name: str | pathlib.Path = 'organism', *, dtype: str = 'auto') -> Model:
  """Loads a model with its tokenizer.

  Args:
    name: a Hugging Face directory, by its path or below the data folder (`DCORE_DATA`);
      'OWNER/NAME' on the Hugging Face hub, from which weights, configuration and tokenizer are
      downloaded, and no code; or 'organism' or '', the small model inside the package.
    dtype: of the parameters: 'float32', 'bfloat16', or 'auto', which is float32 on a CPU and
      bfloat16 elsewhere. Training casts them to float32.

  Raises:
    ValueError: a name that is neither here nor on the hub, a hub that cannot be reached, or a
      directory that does not hold a model with a tokenizer.
  """
  # Before anything is compiled, or the first programs would not be kept.
  distributed.keep_programs()
  folder = find_model_folder(str(name))
  if dtype == 'auto':
    dtype = 'float32' if jax.default_backend() == 'cpu' else 'bfloat16'
  if dtype not in ('float32', 'bfloat16'):
    raise ValueError(f"dtype = {dtype!r}; expected 'auto', 'float32' or 'bfloat16'")
  policy = load_policy(ModelSection(path=str(folder)), seed=0)
  return Model(
    policy.config,
    params=policy.load(None, dtype),
    tokenizer=policy.tokenizer,
    folder=folder,
  )


def generate(
  model: Model,
  conversations: Sequence[Conversation],
  *,
  tools: Sequence[ToolSpec | dict[str, Any]] = (),
  max_tokens: int | None = None,
  temperature: float = SAMPLING['temperature'],
  seed: int = 0,
  **truncation: Any,
) -> list[Answer]:
  """Answers many conversations at once, in their order.

  Args:
    model: from `load`.
    conversations: each a list of messages, `Message`s or records as OpenAI's clients write them
      ({'role', 'content'[, 'tool_calls', 'reasoning_content']}), or a text, which the user says.
    tools: what may be called: specs, or records as OpenAI's clients write them. The chat template
      shows them.
    max_tokens: tokens of an answer; None: as many as there is room for.
    temperature: of sampling; 0 takes the most likely token.
    seed: the same seed and conversations give the same answers.
    **truncation: `top_p` (0.95), `top_k` (20), `min_p` and `stop`, see `SamplingParams`.

  Raises:
    ValueError: a prompt that leaves no room for an answer, an unknown option, or one out of its
      range.
  """
  engine = model._answering.engine(model)
  # The engine's limit is a memory that is set aside once: answers cannot outgrow it.
  given = {'max_tokens': max_tokens or engine.max_new, 'temperature': temperature, 'seed': seed}
  sampling = sampling_rule(given | truncation)
  specs = [tool if isinstance(tool, ToolSpec) else read_tools(tool)[0] for tool in tools]
  # Templates expect OpenAI's wrapper around each spec.
  shown = [{'type': 'function', 'function': spec.to_json()} for spec in specs]
  texts = []
  requests = []
  for number, conversation in enumerate(conversations):
    text = render_records(model.tokenizer, _records(conversation), shown or None)
    prompt = encode_rendered(model.tokenizer, text)
    # Rendered templates hold their special tokens as text; a second beginning of text would be
    # one that the model was not trained on.
    texts.append(text)
    # The place names the random stream, so that an answer does not depend on the others.
    requests.append(Request(prompt, key_id=(number,)))
  completions = engine.generate(requests, sampling)
  answers = []
  for text, completion in zip(texts, completions, strict=True):
    # Some templates open the block of thoughts themselves.
    parser = ReplyParser(specs, thinking=bool(opened_thoughts(text)))
    answers.append(_answer(model.tokenizer, parser, completion))
  return answers


def make_engine(
  model: Model, *, lanes: int, max_len: int = 0, max_new: int = 0, steps_per_call: int = 8
) -> Engine:
  """Returns a rollout engine with the model's present weights.

  Args:
    model: from `load`.
    lanes: rollouts at once.
    max_len: tokens of prompt and answer; 0: the model's positions, but no more than 4,096.
    max_new: tokens of an answer; 0: as many as there is room for.
    steps_per_call: tokens that a lane samples between two looks of the host.
  """
  tokenizer = model.tokenizer
  return Engine(
    model.params(),
    model.config,
    stop_ids=find_stop_ids(model.config, tokenizer, model.folder),
    sizes=EngineSizes(
      lanes=lanes,
      max_len=max_len or min(_MOST_TOKENS, model.config.max_position_embeddings),
      max_new=max_new,
      steps_per_call=steps_per_call,
    ),
    # Stop strings are found in the text of the tokens.
    decode=lambda ids: tokenizer.decode(ids, skip_special_tokens=True),
  )


def sampling_rule(options: Mapping[str, Any]) -> SamplingParams:
  """Returns the rule of sampling with what Qwen3 recommends where `options` say nothing else.

  Raises:
    ValueError: an option that there is not, with the nearest one, or a value out of its range.
  """
  # The constructor would name an unknown option, but not the one that was meant.
  known = [field.name for field in dataclasses.fields(SamplingParams)]
  for name in options:
    if name not in known:
      nearest = difflib.get_close_matches(name, known, n=1)
      hint = f' (did you mean {nearest[0]!r}?)' if nearest else f'; expected one of {known}'
      raise ValueError(f'unknown option of sampling {name!r}{hint}')
  # What is given replaces what Qwen3 recommends, field by field.
  return SamplingParams(**(SAMPLING | dict(options)))


def _records(conversation: Conversation) -> list[dict[str, Any]]:
  if isinstance(conversation, str):
    return [{'role': 'user', 'content': conversation}]
  records = []
  for message in conversation:
    # Records pass as they are, since templates may read fields that `Message` does not have.
    records.append(message.to_json() if isinstance(message, Message) else message)
  return records


def _answer(tokenizer: Any, parser: ReplyParser, completion: Completion) -> Answer:
  # Tags of thoughts and calls are no special tokens of the tokenizers that have them, and stay.
  text = tokenizer.decode(completion.tokens, skip_special_tokens=True)
  if completion.stop is not None:
    # The stop string itself is no part of the answer, as in OpenAI's interface.
    text = text.partition(completion.stop)[0]
  # The server's parser, so that an answer here says what a client would read.
  finished = completion.finished or completion.stop is not None
  delta = parser.push(text, last=True, cut=not finished)
  # The parser writes arguments as JSON text, because that is what clients of the server get.
  calls = tuple(ToolCall(name, json.loads(arguments)) for name, arguments in delta.calls)
  return Answer(
    content=delta.content,
    reasoning=delta.reasoning,
    calls=calls,
    finished=finished,
    prompt_tokens=completion.prompt_len,
    completion_tokens=len(completion.tokens),
  )


def _call_record(call: ToolCall) -> dict[str, Any]:
  function = {'name': call.name, 'arguments': call.arguments}
  return {'type': 'function', 'function': function}
