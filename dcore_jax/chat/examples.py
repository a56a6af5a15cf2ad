"""From conversations to training examples: tokens, and a loss weight for each token.

An assistant's text (thoughts and answer) that is to be learned never passes through a template.
Templates drop and rearrange thoughts, and training must see the tokens that sampling produces. So
an example is cut where the assistant starts to speak, and its pieces are tokenized separately, as
prompt and response are when the model is sampled.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from dcore_jax.chat.encoding import encode_all, mark_answer, shown
from dcore_jax.chat.messages import Message
from dcore_jax.chat.template import TurnFormat, render_prompt, turn_format
from dcore_jax.chat.thoughts import without_opening

LOSS_MASKS = ('final', 'final+structure', 'all_assistant')
# Pieces of one tokenizer call: enough to keep its threads busy, and few enough that the Python
# lists of their ids stay small.
_BATCH = 2048


class Piece(NamedTuple):
  """A stretch of an example's text.

  A trained piece is what an assistant says, without the token that ends its turn. The text is
  `encode_rendered`'s.
  """

  text: str
  trained: bool


def cut_example(
  tokenizer: Any,
  turns: TurnFormat,
  messages: Sequence[Message],
  loss_mask: str = 'final',
  tools: Sequence[dict[str, Any]] | None = None,
) -> list[Piece]:
  """Cuts a conversation that ends with the assistant's message into context and trained text.

  The last piece is the last message's content, verbatim but for what its prompt says already: where
  the template opens the thoughts, the content begins behind that tag (`without_opening`).

  With 'all_assistant' the earlier assistant messages are pieces too, as the template renders them.
  Then the prompt of each must be a prefix of the whole text.

  Raises:
    ValueError: a conversation without an assistant's answer at its end. Trained text that holds the
      end-of-turn token. A template that rewrites an earlier message ('all_assistant').
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
  # Such a text is markup that was read as an answer: what follows is somebody else's message.
  _refuse(last.content, turns.end_of_turn, 'the text to learn')
  text = render_prompt(tokenizer, context, tools)
  spans = []
  if loss_mask == 'all_assistant':
    spans = _assistant_spans(tokenizer, turns, context, tools, text)
  pieces = []
  done = 0
  for start, end in spans:
    pieces += [Piece(text[done:start], False), Piece(text[start:end], True)]
    # The encoder puts the end-of-turn token behind every trained piece.
    done = end + len(turns.end_of_turn)
  # The prompt of an open-thoughts template ends with `<think>`, which must not stand there twice.
  answer = without_opening(last.content, text)
  return [
    *pieces,
    Piece(text[done:], False),
    Piece(mark_answer(tokenizer, answer) + turns.before, True),
  ]


def _refuse(text: str, token: str, where: str) -> None:
  if token in text:
    raise ValueError(f'{where} holds {token} at character {text.index(token)}')


def _assistant_spans(
  tokenizer: Any,
  turns: TurnFormat,
  context: Sequence[Message],
  tools: Sequence[dict[str, Any]] | None,
  text: str,
) -> list[tuple[int, int]]:
  """Finds each assistant message in the rendered context -> (start, end) in characters.

  `end` is where its end-of-turn token begins.
  """
  spans = []
  for index, message in enumerate(context):
    if message.role != 'assistant':
      continue
    if not index:
      raise ValueError(
        "message 0 is the assistant's: nothing comes before it that could be its prompt"
      )
    _refuse(message.content, turns.end_of_turn, f'message {index}')
    prompt = render_prompt(tokenizer, context[:index], tools)
    # What was sampled followed exactly this prompt. If the whole text has another one there,
    # training would see tokens that no sampling produces.
    if not text.startswith(prompt):
      raise ValueError(
        f'the chat template is not prefix-stable: what comes before message {index} is rendered '
        'otherwise once the conversation goes on (Qwen3 drops earlier thoughts); split the '
        'conversation with sft.split_turns'
      )
    start = len(prompt)
    end = text.find(turns.end_of_turn, start)
    # White space at both ends is the template's own; all else has to be what the model said.
    if shown(text[start:end]).strip() != without_opening(message.content, prompt).strip():
      raise ValueError(
        f'the chat template does not render message {index} as it is (Qwen3 drops earlier '
        'thoughts); split the conversation with sft.split_turns'
      )
    spans.append((start, end))
  return spans


def encode_pieces(
  tokenizer: Any, turns: TurnFormat, examples: Sequence[Sequence[Piece]], loss_mask: str = 'final'
) -> list[tuple[np.ndarray, np.ndarray]]:
  """Encodes examples -> (tokens int32[n], weights float32[n]) of each.

  The tokenizer is called once for thousands of pieces.

  Weight 1 is on the tokens of trained pieces and on the end-of-turn token after each piece. That is
  all with 'final' (the paper's -log p(Y | C, Q)) and with 'all_assistant'.

  'final+structure' adds what the released tokenization supervises beside the answer, in every
  message. That is every special token between contents (Qwen3: <|im_start|> and <|im_end|>, Llama:
  both header markers and <|eot_id|>), and the white space behind every end of turn (Qwen3: the
  newline, the last message's included). Roles and the newline after them have weight 0. So has the
  content of all messages but the trained pieces, `tool` messages included.

  It differs from the released tokenization in five points:
    - The text is the template's, which may add to it (tools in the system turn).
    - Role, newline and content are one text, so that no token is cut between them.
    - A row's first token is not trained, since nothing in its row predicts it (released: the end of
      the row packed before it does).
    - The white space in front of the answer is prompt (released: trained for Llama).
    - Weights are 0 where nothing is trained, so that their sum is the denominator (released:
      earlier answers count there without a loss).
  On D-CORE's own rows tokens and labels are the released ones, except for the first label.
  """
  encoded = _encode_texts(tokenizer, examples)
  structure = loss_mask == 'final+structure'
  after = []
  if structure and turns.after:
    # The white space is encoded once, alone, and is looked for by its token ids.
    after = tokenizer.encode(turns.after, add_special_tokens=False)
  after = np.array(after, np.int32)
  # The token is appended by its id, since encoding a text would not always give special tokens.
  end = np.array([turns.end_of_turn_id], np.int32)
  result = []
  for pieces in examples:
    parts = []
    weights = []
    for piece in pieces:
      tokens = next(encoded)
      # Pieces are tokenized separately, so that no token spans the border between prompt and
      # answer.
      parts.append(tokens)
      if piece.trained:
        parts.append(end)
      # True counts as one more token (the end of the turn) and as weight 1.
      weights.append(np.full(len(tokens) + piece.trained, piece.trained, np.float32))
    tokens = np.concatenate(parts)
    weight = np.concatenate(weights)
    if structure:
      tokens = np.concatenate([tokens, after])
      weight = np.pad(weight, (0, len(after)))
      # A token that is trained for either reason has weight 1, and not 2.
      weight = np.maximum(weight, _structure_weights(tokens, turns, after))
    result.append((tokens, weight))
  return result


def _encode_texts(tokenizer: Any, examples: Sequence[Sequence[Piece]]) -> Iterator[np.ndarray]:
  """Yields the token ids int32[n] of every piece of every example, in order."""
  # A fast tokenizer works on a batch with all its threads; one call a piece would use one thread.
  texts = [piece.text for piece in itertools.chain.from_iterable(examples)]
  for start in range(0, len(texts), _BATCH):
    for ids in encode_all(tokenizer, texts[start : start + _BATCH]):
      yield np.array(ids, np.int32)


def _structure_weights(tokens: np.ndarray, turns: TurnFormat, after: np.ndarray) -> np.ndarray:
  """Returns weight 1 on delimiters and on the white space `after` behind every end of turn.

  The first token has weight 0: nothing in the row predicts it.
  """
  weight = np.isin(tokens, list(turns.delimiters)).astype(np.float32)
  ends = np.flatnonzero(tokens == turns.end_of_turn_id)
  # An end of turn that stands too close to the end of the row has no room for the white space.
  ends = ends[ends + len(after) < len(tokens)]
  places = ends[:, None] + 1 + np.arange(len(after))
  # The template may write other white space behind some turns, which is not trained.
  follows = (tokens[places] == after).all(axis=1)
  weight[places[follows]] = 1
  weight[0] = 0
  return weight


def encode_example(
  tokenizer: Any,
  messages: Sequence[Message],
  loss_mask: str = 'final',
  tools: Sequence[dict[str, Any]] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
  """Encodes one conversation -> (tokens int32[n], weights float32[n]).

  For many conversations cut each and encode them together, which is faster.
  """
  turns = turn_format(tokenizer)
  pieces = cut_example(tokenizer, turns, messages, loss_mask, tools)
  return encode_pieces(tokenizer, turns, [pieces], loss_mask)[0]
