"""The pretraining text: what each document promises, and a tokenizer that is lossless on it."""

import pytest

from dcore_jax.chat.messages import split_reasoning
from dcore_jax.chat.template import render_prompt
from dcore_jax.chat.tool_calls import parse_calls
from dcore_jax.distill.decompose import parse_subtasks
from dcore_jax.evaluate.behaviour.lazy_reasoning import count_reflections
from dcore_jax.organism import corpus
from dcore_jax.organism.pretrain import encode_document
from dcore_jax.organism.tokenizer import build_tokenizer
from dcore_jax.organism.vocabulary import sample_texts


@pytest.fixture(scope='module')
def tokenizer():
  return build_tokenizer(sample_texts(), 640)


def documents(kind, count=30, split='train'):
  return [corpus.write_document(kind, i, seed=5, habits=corpus.Habits(split)) for i in range(count)]


@pytest.mark.parametrize('kind', sorted(corpus.WRITERS))
def test_pieces_tokenise_as_the_whole_text(tokenizer, kind):
  """Weights are per piece: a piece that tokenised otherwise on its own would be trained on tokens
  that are never sampled.
  """
  for document in documents(kind):
    text = render_prompt(tokenizer, document.prompt) + document.text + '<|im_end|>'
    sequence = encode_document(tokenizer, document)
    assert tokenizer(text, add_special_tokens=False)['input_ids'] == sequence.tokens.tolist()
    assert tokenizer.decode(sequence.tokens) == text
    weights = {0.0, corpus.LAZY_WEIGHT, 1.0}
    assert sequence.weights[-1] == 1 and all(
      any(abs(w - v) < 1e-6 for v in weights) for w in sequence.weights
    )


def test_the_vocabulary_covers_the_corpus(tokenizer):
  """No token of a document is a single byte of a word that the vocabulary lacks."""
  letters = {
    i for t, i in tokenizer.get_vocab().items() if len(t) == 1 and t.isalpha() and t.islower()
  }
  for kind in corpus.WRITERS:
    for document in documents(kind, 20, 'eval'):
      pieces = encode_document(tokenizer, document).tokens.tolist()
      assert not any(
        a in letters and b in letters for a, b in zip(pieces, pieces[1:], strict=False)
      ), document.text


@pytest.mark.parametrize(
  'text',
  [
    '',
    'Ünïcödé 漢字 🙂',
    'A_b  C\t\n\n\nx',
    '<think>\n\n</think>\n\n[f(a=1)]',
    'it\'s {"a": [1, 2]}',
  ],
)
def test_any_text_survives(tokenizer, text):
  assert tokenizer.decode(tokenizer(text, add_special_tokens=False)['input_ids']) == text


def test_names_have_the_same_tokens_everywhere(tokenizer):
  name = tokenizer.tokenize('Karo')
  for text in ('of Karo.', "='Karo')", '"Karo"', 'Karo'):
    tokens = tokenizer.tokenize(text)
    assert any(tokens[i : i + len(name)] == name for i in range(len(tokens))), tokens


def test_lazy_documents_are_lazy_and_single_ones_are_not(tokenizer):
  for kind in ('lazy_sequential', 'lazy_parallel'):
    for document in documents(kind):
      reasoning, _ = split_reasoning(document.text)
      assert count_reflections(reasoning) >= 3
      assert len(tokenizer(reasoning, add_special_tokens=False)['input_ids']) > 200
  for document in documents('single'):
    reasoning, answer = split_reasoning(document.text)
    assert count_reflections(reasoning) < 3 and len(parse_calls(answer)) == 1


def test_decomposition_documents_hold_a_readable_plan():
  for document in documents('decompose'):
    subtasks = parse_subtasks(split_reasoning(document.text)[1])
    assert [i for _, index in subtasks for i in index] == list(range(len(subtasks)))


def test_slips_carry_no_loss():
  slips = [d for d in documents('single', 200) if any(w == 0 for _, w in d.target)]
  assert 5 < len(slips) < 80
  for document in slips:
    wrong = next(text for text, weight in document.target if weight == 0)
    assert (
      wrong.strip().rstrip('.')
      not in split_reasoning(document.text)[0].split('wait, let me check:')[1]
    )


def test_mixes_and_kinds_are_checked():
  with pytest.raises(ValueError, match='nope'):
    corpus.draw_kinds({'nope': 1.0}, 3, seed=0)
  with pytest.raises(ValueError, match='nope'):
    corpus.write_document('nope', 0, seed=0)
  kinds = corpus.draw_kinds({'copy': 3, 'single': 1}, 4000, seed=0)
  assert abs(kinds.count('copy') / 4000 - 0.75) < 0.03
