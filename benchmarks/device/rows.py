"""What `benchmarks.device` writes down: a row a figure, judged against what was said of it before.

A figure is a fact, or it is compared with one of four things: the least time of the plan (a
roofline), the rate of a data sheet, the memory of the plan, or a tolerance. Each comparison is a
share, and a row says whether the share lies where it should.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

AGREES = 'agrees'
DISAGREES = 'DISAGREES'
FAILED = 'FAILED'
SKIPPED = 'skipped'
FACT = ''  # a figure that nothing was said of

# The least share of a roofline or of a data sheet's rate that is taken for sound. They were chosen
# before any run on an accelerator: a well-tuned large product reaches 0.7 to 0.85 of the sheet, a
# good fused attention 0.5 to 0.75, and published training runs 0.35 to 0.55 of the sheet in all. A
# smaller share says that something of ours, or of the machine, is not as it should be.
LEAST_SHARES: Mapping[str, float] = {
  'product': 0.6,
  'memory': 0.6,
  'tree attention': 0.25,
  'page attention': 0.4,
  'head': 0.4,
  'sft': 0.35,
  'update': 0.3,
  'rl step': 0.25,
  'prefill': 0.3,
  'decode': 0.4,
}
# Clocks and timers are not exact: so far above 1 a share may lie.
_MOST_SHARE = 1.05
# Bytes that a step may use beyond those of the plan, for what the plan leaves to head room.
_MEMORY_SLACK = 0.05


@dataclasses.dataclass(frozen=True)
class Row:
  """A figure.

  Attributes:
    part: the part of the program that measured it.
    case: what was measured.
    value: the figure, in `unit`; None where there is none.
    unit: of value and plan.
    plan: what was said of it before; None for a fact.
    share: how near the figure comes to `plan`. Of a bound, 1 is as good as can be; of a tolerance,
      1 is all of it.
    verdict: 'agrees', 'DISAGREES', 'FAILED', 'skipped', or '' for a fact.
    note: a sentence for a person.
    more: further fields of the JSON line.
  """

  part: str
  case: str
  value: float | None = None
  unit: str = ''
  plan: float | None = None
  share: float | None = None
  verdict: str = FACT
  note: str = ''
  more: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def to_json(self) -> dict[str, Any]:
    """Returns the fields of a JSON line; `more` stands beside the others."""
    fields = dataclasses.asdict(self)
    more = fields.pop('more')
    return {name: _rounded(value) for name, value in {**fields, **more}.items()}

  @classmethod
  def from_json(cls, record: Mapping[str, Any]) -> 'Row':
    """Reads a JSON line back."""
    own = {field.name for field in dataclasses.fields(cls)}
    more = {name: value for name, value in record.items() if name not in own}
    return cls(**{name: record[name] for name in record if name in own}, more=more)


def fact(part: str, case: str, value: float, unit: str, **more: Any) -> Row:
  """Returns a figure that nothing was said of."""
  return Row(part=part, case=case, value=value, unit=unit, more=more)


def against_bound(row: Row, bound: float, least: float | None) -> Row:
  """Returns a time or a rate with its share of what is possible.

  Args:
    row: its value; in seconds, or in something a second.
    bound: the least seconds, or the highest rate.
    least: the least share that is sound; None where the peaks are no data sheet's, so that nothing
      can be said.
  """
  share = bound / row.value if row.unit == 's' else row.value / bound
  row = dataclasses.replace(row, plan=bound, share=share)
  if least is None:
    return row
  if share > _MOST_SHARE:
    return dataclasses.replace(
      row,
      verdict=DISAGREES,
      note='better than the plan says is possible: its peak, or its count of the work, is wrong',
    )
  if share < least:
    note = f'{share:.0%} of what is possible, where at least {least:.0%} was expected'
    return dataclasses.replace(row, verdict=DISAGREES, note=note)
  return dataclasses.replace(row, verdict=AGREES)


def within(row: Row, tolerance: float) -> Row:
  """Returns an error with its share of the largest that is allowed."""
  share = row.value / tolerance
  # Written so that NaN disagrees.
  good = share <= 1
  note = '' if good else f'off by {row.value:.3g}, where {tolerance:.3g} is allowed'
  return dataclasses.replace(
    row, plan=tolerance, share=share, verdict=AGREES if good else DISAGREES, note=note
  )


def against_memory(row: Row, planned: float) -> Row:
  """Returns the memory that was in use beside what the plan says."""
  share = row.value / planned
  good = share <= 1 + _MEMORY_SLACK
  note = '' if good else f'{share:.2f} times what the plan says'
  return dataclasses.replace(
    row, plan=planned, share=share, verdict=AGREES if good else DISAGREES, note=note
  )


def claim(part: str, case: str, holds: bool, note: str, **more: Any) -> Row:
  """Returns something that has to hold; the note says what it means where it does not."""
  return Row(
    part=part,
    case=case,
    verdict=AGREES if holds else DISAGREES,
    note='' if holds else note,
    more=more,
  )


def failed(part: str, case: str, reason: str) -> Row:
  """Returns the row of what ended in an error."""
  return Row(part=part, case=case, verdict=FAILED, note=reason)


def skipped(part: str, case: str, reason: str) -> Row:
  """Returns the row of what cannot be measured here."""
  return Row(part=part, case=case, verdict=SKIPPED, note=reason)


def wrong(rows: Sequence[Row]) -> list[Row]:
  """Returns the rows that disagree or failed."""
  return [row for row in rows if row.verdict in (DISAGREES, FAILED)]


def table(rows: Sequence[Row]) -> str:
  """Returns all rows as one table, and behind it what disagrees."""
  cases = max((len(row.case) for row in rows), default=0)
  lines = [f'{"part":10}{"":{cases}}{"measured":>12}{"plan":>12}  {"unit":9}{"share":>6}']
  part = ''
  for row in rows:
    # The name of a part stands once, at its first row.
    name = '' if row.part == part else row.part
    part = row.part
    share = '' if row.share is None else f'{row.share:.0%}'
    line = (
      f'{name:10}{row.case:{cases}}{_number(row.value):>12}{_number(row.plan):>12}  {row.unit:9}'
      f'{share:>6}  {row.verdict}'
    )
    if row.verdict == SKIPPED:
      line += f': {row.note}'
    lines.append(line.rstrip())
  found = wrong(rows)
  judged = sum(row.verdict == AGREES for row in rows) + len(found)
  lines += ['', f'{judged} of {len(rows)} figures were judged, {len(found)} disagree or failed']
  lines += [f'  {row.part}, {row.case}: {row.verdict}: {row.note}' for row in found]
  return '\n'.join(lines)


def _number(value: float | None) -> str:
  return '' if value is None else f'{value:,.4g}'


def _rounded(value: Any) -> Any:
  if isinstance(value, (float, np.floating)):
    # JSON has no NaN, and a figure that is none must still be told.
    return float(f'{value:.4g}') if np.isfinite(value) else str(value)
  if isinstance(value, np.integer):
    return int(value)
  return value
