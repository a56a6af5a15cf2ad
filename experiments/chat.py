"""Talk to a model, alone or with the tools of a world.

    python -m experiments.chat --model=DIR --world=toolworld     or bfcl, or none
    python -m experiments.chat --model=DIR --world='mcp:COMMAND'   an MCP server, by command or URL
    python -m experiments.chat --model=DIR --register=my_worlds --world=mine

The world runs the calls. The end of the input ends the conversation.
"""

import importlib
import sys

from absl import app, flags, logging

from dcore_jax.data.show_rows import use_colour
from dcore_jax.progress import show_compiling
from dcore_jax.rollout.sampling import SamplingParams
from dcore_jax.run import help as help_lib
from dcore_jax.run import program
from dcore_jax.run.terminal import Chat, Speaker
from dcore_jax.serve.scheduler import Scheduler, Stopped
from dcore_jax.serve.server import DTYPES, load_model
from dcore_jax.worlds.registry import world_and_kind

_MODEL = flags.DEFINE_string(
  'model', '', 'Hugging Face directory; default: the organism inside the package.'
)
_DTYPE = flags.DEFINE_enum(
  'dtype', 'auto', ['auto', *DTYPES], 'Of weights and cache; auto: float32 on a CPU, else bfloat16.'
)
_TENSOR = flags.DEFINE_integer('tensor', 1, 'Devices that the model is split over.')
_WORLD = flags.DEFINE_string(
  'world',
  'none',
  'Whose tools the model may call: none, toolworld, bfcl, a registered name, or mcp: and the '
  'command, the address or the JSON file (docs/your_tools.md) of an MCP server.',
)
_REGISTER = flags.DEFINE_multi_string('register', [], 'Python modules that register worlds.')
_KIND = flags.DEFINE_string(
  'kind', '', "Of the world's tasks; default: sequential, or the world's first where it has none."
)
_SYSTEM = flags.DEFINE_string('system', '', 'System message of a conversation without a world.')
_MAX_LEN = flags.DEFINE_integer(
  'max_len', 0, 'Tokens of the conversation; default: the positions of the model, at most 4096.'
)
_MAX_TOKENS = flags.DEFINE_integer('max_tokens', 2048, 'Tokens of an answer at most.')
_TEMPERATURE = flags.DEFINE_float('temperature', 0.6, 'Of sampling; 0 takes the most likely token.')
_TOP_P = flags.DEFINE_float('top_p', 0.95, 'Share of the probability that is sampled from.')
_TOP_K = flags.DEFINE_integer('top_k', 20, 'Tokens that are sampled from; 0: all.')
_SEED = flags.DEFINE_integer(
  'seed', 0, 'Of sampling: the same seed and lines give the same conversation.'
)

help_lib.group('the model', _MODEL, _DTYPE, _TENSOR, _MAX_LEN)
help_lib.group('the world', _WORLD, _REGISTER, _KIND, _SYSTEM)
help_lib.group('sampling', _MAX_TOKENS, _TEMPERATURE, _TOP_P, _TOP_K, _SEED)


def main(argv: list[str]) -> None:
  """Asks, answers, and ends at the end of its input."""
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments: {argv[1:]}')
  logging.set_verbosity(logging.WARNING)  # jax reports the backends that it does not find
  try:
    for module in _REGISTER.value:
      importlib.import_module(module)
    world, kind = world_and_kind(_WORLD.value, _KIND.value)
    sampling = SamplingParams(
      temperature=_TEMPERATURE.value,
      top_p=_TOP_P.value,
      top_k=_TOP_K.value,
      max_tokens=_MAX_TOKENS.value,
      seed=_SEED.value,
    )
    model = load_model(
      _MODEL.value,
      dtype=_DTYPE.value,
      tensor=_TENSOR.value,
      lanes=1,
      max_len=_MAX_LEN.value,
      steps_per_call=4,
    )
  except (ImportError, ValueError) as error:
    sys.exit(f'error: {error}')
  # One may wait: the lane of a cancelled answer comes free a step later.
  scheduler = Scheduler(model.engine, max_waiting=1)
  print(f'{model.name}: {model.summary()}', file=sys.stderr)
  # Before the first line is typed, or its answer would wait for it.
  scheduler.prepare()
  show_compiling(scheduler.wait_until_ready)
  chat = Chat(
    Speaker(scheduler, model.tokenizer, sampling, sys.stdout, use_colour(sys.stdout)),
    system=_SYSTEM.value,
    world=world,
    kind=kind,
  )
  try:
    chat.start()
    while True:
      try:
        line = input('> ')
      except KeyboardInterrupt:  # at the prompt there is nothing to cancel but the line
        print()
        continue
      chat.take(line)
  except EOFError:
    print()
  except Stopped as error:
    sys.exit(f'error: {error}')
  finally:
    scheduler.close()


if __name__ == '__main__':
  app.run(main, flags_parser=program.parse)
