"""From conversations to training examples: tokens, and a loss weight for each.

An assistant's text (thoughts and answer) that is to be learned never passes through a template: templates drop and rearrange
thoughts, and training must see the tokens that sampling produces. So an example is cut where the assistant starts to speak,
and the pieces are tokenized apart, as prompt and response are when the model is sampled.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from dcore_jax.chat.messages import Message
from dcore_jax.chat.template import TurnFormat, render_prompt, turn_format

LOSS_MASKS = ('final', 'final+structure', 'all_assistant')
_BATCH = 2048  # pieces a tokenizer call: enough to keep its threads busy, few enough that their Python lists stay small


class Piece(NamedTuple):
  """A stretch of an example's text. A trained one is what an assistant says, without the token that ends its turn."""

  text: str
  trained: bool


def cut_example(
  tokenizer: Any,
  turns: TurnFormat,
  messages: Sequence[Message],
  loss_mask: str = 'final',
  tools: Sequence[dict[str, Any]] | None = None,
) -> list[Piece]:
  """The pieces of a conversation that ends with the assistant's message: context and trained text in turn.

  The last piece is the last message's content, verbatim. With 'all_assistant' the earlier assistant messages are pieces too,
  as the template renders them; then the prompt of each must be a prefix of the whole text.

  Raises:
    ValueError: a conversation without an assistant's answer at its end; trained text that holds the end-of-turn token (any
      message and any delimiter with 'final+structure'); a template that rewrites an earlier message ('all_assistant').
  """
  if loss_mask not in LOSS_MASKS:
    raise ValueError(f'unknown loss_mask {loss_mask!r}; expected one of {LOSS_MASKS}')
  if not messages:
    raise ValueError('an example needs messages, got none')
  *context, last = messages
  if last.role != 'assistant':
    raise ValueError(
      f"the last message of an example must be the assistant's, got one of role {last.role!r}"
    )
  if not context:
    raise ValueError("an example needs a message before the assistant's")
  _refuse(last.content, [turns.end_of_turn], 'the text to learn')
  if loss_mask == 'final+structure':
    for index, message in enumerate(messages):
      _refuse(message.content, turns.delimiters.values(), f'message {index}')
  text = render_prompt(tokenizer, context, tools)
  spans = (
    _assistant_spans(tokenizer, turns, context, tools, text) if loss_mask == 'all_assistant' else []
  )
  pieces, done = [], 0
  for start, end in spans:
    pieces += [Piece(text[done:start], False), Piece(text[start:end], True)]
    done = end + len(turns.end_of_turn)
  return [*pieces, Piece(text[done:], False), Piece(last.content + turns.before, True)]


def _refuse(text: str, tokens: Sequence[str], where: str) -> None:
  for token in tokens:
    if token in text:
      raise ValueError(f'{where} holds {token} at character {text.index(token)}')


def _assistant_spans(
  tokenizer: Any,
  turns: TurnFormat,
  context: Sequence[Message],
  tools: Sequence[dict[str, Any]] | None,
  text: str,
) -> list[tuple[int, int]]:
  """Where in the rendered context each assistant message stands: (its first character, that of its end-of-turn token)."""
  spans = []
  for index, message in enumerate(context):
    if message.role != 'assistant':
      continue
    if not index:
      raise ValueError(
        "message 0 is the assistant's: nothing comes before it that could be its prompt"
      )
    _refuse(message.content, [turns.end_of_turn], f'message {index}')
    prompt = render_prompt(tokenizer, context[:index], tools)
    if not text.startswith(prompt):
      raise ValueError(
        f'the chat template is not prefix-stable: what comes before message {index} is rendered otherwise once '
        'the conversation goes on (Qwen3 drops earlier thoughts); split the conversation with sft.split_turns'
      )
    start = len(prompt)
    end = text.find(turns.end_of_turn, start)
    if text[start:end].strip() != message.content.strip():
      raise ValueError(
        f'the chat template does not render message {index} as it is (Qwen3 drops earlier thoughts); split the '
        'conversation with sft.split_turns'
      )
    spans.append((start, end))
  return spans


def encode_pieces(
  tokenizer: Any, turns: TurnFormat, examples: Sequence[Sequence[Piece]], loss_mask: str = 'final'
) -> list[tuple[np.ndarray, np.ndarray]]:
  """(tokens int32[n], weights float32[n]) of each example; the tokenizer is called once for thousands of pieces.

  Weight 1 is on the tokens of trained pieces and on the end-of-turn token after each. That is all with 'final' (the paper's
  -log p(Y | C, Q)) and 'all_assistant'. 'final+structure' adds what the released tokenization supervises beside the answer:
  every special token between contents (Qwen3: <|im_start|> and <|im_end|>, Llama: both header markers and <|eot_id|>) and the
  white space behind every end of turn (Qwen3: the newline), of every message, the last one's newline included. Roles and the
  newline after them have weight 0, and so has the content of everything but the trained pieces, `tool` messages included.

  It differs from the released tokenization so: the text is the template's, which may add to it (tools in the system turn);
  role, newline and content are one text, so that no token is cut where it was not; a row's first token is not trained, since
  nothing in its row predicts it (released: the end of the row packed before it does); the white space in front of the answer
  is prompt (released: trained for Llama); weights are 0 where nothing is trained, so that they add up to the denominator
  (released: earlier answers count there without a loss). On D-CORE's own rows tokens and labels are the released ones, the
  first label apart.
  """
  flat = [piece.text for pieces in examples for piece in pieces]
  ids = []
  for start in range(0, len(flat), _BATCH):
    encoded = tokenizer(
      flat[start : start + _BATCH], add_special_tokens=False, return_attention_mask=False
    )['input_ids']
    ids += [np.array(tokens, np.int32) for tokens in encoded]
  structure = loss_mask == 'final+structure'
  after = np.array(
    tokenizer.encode(turns.after, add_special_tokens=False) if structure and turns.after else [],
    np.int32,
  )
  end = np.array([turns.end_of_turn_id], np.int32)
  result, place = [], 0
  for pieces in examples:
    parts, weights = [], []
    for piece, tokens in zip(pieces, ids[place : place + len(pieces)]):
      parts += [tokens, end] if piece.trained else [tokens]
      weights.append(np.full(len(tokens) + piece.trained, piece.trained, np.float32))
    place += len(pieces)
    tokens, weight = np.concatenate(parts), np.concatenate(weights)
    if structure:
      tokens = np.concatenate([tokens, after])
      weight = np.maximum(np.pad(weight, (0, len(after))), _structure(tokens, turns, after))
    result.append((tokens, weight))
  return result


def _structure(tokens: np.ndarray, turns: TurnFormat, after: np.ndarray) -> np.ndarray:
  """1 on the delimiters and on the white space `after` behind every end of turn; 0 on the first token."""
  weight = np.isin(tokens, list(turns.delimiters)).astype(np.float32)
  ends = np.flatnonzero(tokens == turns.end_of_turn_id)
  ends = ends[ends + len(after) < len(tokens)]
  places = ends[:, None] + 1 + np.arange(len(after))
  weight[places[(tokens[places] == after).all(axis=1)]] = 1
  weight[0] = 0
  return weight


def encode_example(
  tokenizer: Any,
  messages: Sequence[Message],
  loss_mask: str = 'final',
  tools: Sequence[dict[str, Any]] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
  """(tokens int32[n], weights float32[n]) of one conversation; for many, cut each and encode them together."""
  turns = turn_format(tokenizer)
  return encode_pieces(
    tokenizer, turns, [cut_example(tokenizer, turns, messages, loss_mask, tools)], loss_mask
  )[0]
