"""Samples of everything that the organism reads or writes, for its tokenizer's vocabulary."""

import dataclasses
import json
import string
from collections.abc import Iterator

from dcore_jax.chat.messages import ToolSpec
from dcore_jax.distill.wording import ORGANISM_WORDING
from dcore_jax.organism import corpus
from dcore_jax.worlds.toolworld.entities import FIRST_SYLLABLES, ID_LETTER, SECOND_SYLLABLES
from dcore_jax.worlds.toolworld.tools import TOOLS

DOCUMENTS = 60  # of each kind: every phrasing occurs


def sample_texts() -> Iterator[str]:
  """Yields texts that together hold each word, syllable, digit and punctuation token in use."""
  yield 'system\nuser\nassistant\n\n ' + string.punctuation
  yield ' '.join(a + b for a, b in zip(FIRST_SYLLABLES, SECOND_SYLLABLES, strict=False))
  yield ' '.join(ID_LETTER.values()) + string.digits
  yield from dataclasses.asdict(ORGANISM_WORDING.templates).values()
  yield from (ORGANISM_WORDING.prompts.decompose, ORGANISM_WORDING.prompts.explain)
  for tool in TOOLS.values():
    spec: ToolSpec = tool.spec
    yield json.dumps(spec.to_json())
    yield from tool.phrasings
    # A word has another token behind a space, and phrasings occur in both places.
    yield from (' ' + text for text in tool.phrasings)
    yield from (text for text, _ in tool.partials)
    yield ' '.join(tool.parameters) + ' ' + ' '.join(p + ' not given' for p in tool.parameters)
  # Whole documents add what the templates of prompts and answers put between these words.
  for kind in corpus.WRITERS:
    for index in range(DOCUMENTS):
      document = corpus.write_document(kind, index, seed=0)
      yield from (m.content for m in document.prompt)
      yield document.text
