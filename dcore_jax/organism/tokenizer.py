"""Builds the organism's tokenizer of words, syllables of two letters, single digits, and bytes.

It is a byte-level BPE without merges, whose vocabulary holds whole words (`ignore_merges`). No text
is lost. A space before a capital, a digit or a tool name is a token of its own, so that a name has
the same tokens in a query, a call and a response. Copying is then token for token, which a small
model can learn.
"""

import re
from collections.abc import Iterable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dcore_jax.chat.template import qwen3_template

SPECIAL = ('<|endoftext|>', '<|im_start|>', '<|im_end|>')
TAGS = ('<think>', '</think>', '<tool_call>', '</tool_call>', '<tool_response>', '</tool_response>')
# Names are cut into syllables and numbers into digits; JSON's punctuation between values is one
# token.
PATTERN = (
  r' (?=[a-z]+_)|[a-z]+_[a-z]+|[A-Z][a-z]| ?[a-z]+|[A-Z]|[0-9]|\n\n|\n'
  r"""|\{"|": "|": \[|": |", "|"\}|\]\}|, \{"|, "|='|', |'\)|, |[^\n]"""
)


def build_tokenizer(texts: Iterable[str], size: int = 768) -> PreTrainedTokenizerFast:
  """Builds a tokenizer whose vocabulary holds every piece that occurs in `texts`.

  Args:
    texts: samples of everything the model will read or write; pieces not seen here fall back to
      bytes.
    size: vocabulary size the result must fit in; the embedding has so many rows.
  """
  # Tags are added as whole tokens below, so that their parts need no entries.
  tags = re.compile('|'.join(re.escape(t) for t in SPECIAL + TAGS))
  pieces: set[str] = set()
  for text in texts:
    for part in tags.split(text):
      pieces.update(re.findall(PATTERN, part))
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  # BPE's vocabulary is written in byte characters, where a space is Ġ.
  to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  words = sorted({to_bytes.pre_tokenize_str(p)[0][0] for p in pieces} - set(alphabet))
  vocabulary = {token: i for i, token in enumerate([*alphabet, *words])}
  # A larger vocabulary would index rows that the embedding does not have.
  if len(vocabulary) + len(SPECIAL) + len(TAGS) > size:
    raise ValueError(
      f'{len(vocabulary) + len(SPECIAL) + len(TAGS)} tokens do not fit a vocabulary of {size}'
    )
  tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
    [pre_tokenizers.Split(Regex(PATTERN), behavior='isolated'), to_bytes]
  )
  tokenizer.decoder = decoders.ByteLevel()
  tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
  # Tags are no special tokens: decoding without specials must keep thoughts and calls.
  tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in TAGS])
  return PreTrainedTokenizerFast(
    tokenizer_object=tokenizer,
    # The chat template ends every turn by this token, as Qwen3's does.
    eos_token='<|im_end|>',
    pad_token='<|endoftext|>',
    chat_template=qwen3_template(),
    clean_up_tokenization_spaces=False,
  )
