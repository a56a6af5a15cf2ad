"""lm-eval's client of completions asks the server at argv[1]; argv[2]: a tokenizer.

It prints the log-likelihood of each pair, and whether the continuation is the likeliest.
"""

import json
import sys

from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI

url, folder = sys.argv[1:3]
model = LocalCompletionsAPI(
  base_url=f'{url}/completions',
  model='organism',
  tokenizer=folder,
  tokenizer_backend='huggingface',
  tokenized_requests=True,
  max_length=128,
  batch_size=2,
  num_concurrent=1,
  max_retries=1,
)
pairs = [('find the', ' order'), ('find the', ' customer'), ('the order', ' of Mora')]
asked = [
  Instance(request_type='loglikelihood', doc={}, arguments=pair, idx=number)
  for number, pair in enumerate(pairs)
]
got = model.loglikelihood(asked)
until = {'until': ['\n'], 'max_gen_toks': 4, 'do_sample': False}
texts = model.generate_until(
  [Instance(request_type='generate_until', doc={}, arguments=('find the', until), idx=0)]
)
assert isinstance(texts[0], str), texts
print(json.dumps(got))
