"""Draws the charts of a report as inline SVG with the page's colours, for light and dark themes.

Matplotlib draws with stand-in colours; `_to_inline_svg` swaps each for a CSS variable of the page.
Text stays text (the page's own font, selectable), ids are made unique to the chart, and nothing in
the result points outside the page.
"""

import io
import re
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Colours that nobody would choose, and what they become.
_INK = '#010000'
_MUTED = '#020000'
_RULE = '#030000'
STAGE_COLOURS = {'base': '#0a0001', 'sft': '#0a0002', 'da_grpo': '#0a0003', 'grpo': '#0a0004'}
_OTHER = '#0a0005'
_VARIABLES = {_INK: '--ink', _MUTED: '--muted', _RULE: '--rule', _OTHER: '--other'} | {
  colour: f'--{stage.replace("_", "-")}' for stage, colour in STAGE_COLOURS.items()
}

# Inches at 72 points: about the width of a phone, so that a chart is never shrunk below its own
# type size.
_SIZE = (4.5, 2.5)

Points = Sequence[tuple[float, float]]


def grouped_bars(
  name: str,
  groups: Sequence[str],
  series: Mapping[str, Sequence[float | None]],
  labels: Mapping[str, str],
  *,
  percent: bool,
) -> str:
  """Bars side by side, one group per name in `groups`, one colour per stage; a missing value leaves
  its place empty.

  Args:
    name: unique on the page.
    series: stage -> one value per group (shares in 0..1 where `percent`).
    labels: stage -> what the legend calls it.
  """
  figure, axes = _figure()
  # A lone group would otherwise be a few walls of colour.
  width = (0.8 if len(groups) > 1 else 0.45) / max(len(series), 1)
  for index, (stage, values) in enumerate(series.items()):
    heights = np.array([np.nan if value is None else value for value in values], float) * (
      100 if percent else 1
    )
    places = np.arange(len(groups)) + (index - (len(series) - 1) / 2) * width
    axes.bar(
      places,
      # A missing value has height 0 and no label, which leaves its place empty.
      np.nan_to_num(heights),
      width * 0.88,
      color=_stage_colour(stage),
      label=labels.get(stage, stage),
    )
    for place, height in zip(places, heights, strict=True):
      if np.isfinite(height):
        axes.annotate(
          f'{height:.0f}' if percent else f'{height:.1f}',
          (place, height),
          (0, 2.5),
          ha='center',
          textcoords='offset points',
          fontsize=8,
          color=_MUTED,
        )
  axes.set_xticks(np.arange(len(groups)), groups)
  axes.tick_params(axis='x', length=0, labelcolor=_INK)
  axes.set_xlim(-0.5, len(groups) - 0.5)
  axes.margins(y=0.12)
  axes.set_ylim(bottom=0)
  # With all bars at 0 matplotlib would scale the axis to rounding errors.
  if axes.get_ylim()[1] < 1e-9:
    axes.set_ylim(0, 1)
  if percent:
    axes.yaxis.set_major_formatter('{x:.0f} %')
  _legend(axes)
  return _to_inline_svg(figure, name)


def curves(
  name: str,
  lines: Mapping[str, Points],
  *,
  colours: Sequence[str] = ('da_grpo', 'base', 'sft'),
  percent: bool = False,
  log: bool = False,
) -> str:
  """Lines over training steps; a legend where there is more than one.

  Args:
    lines: label -> (step, value) points, without gaps filled in.
    colours: the stages whose colours the lines take, in order.
    log: logarithmic values; what is not positive is left out. Ignored where nothing is positive.
  """
  positive = False
  for points in lines.values():
    positive = positive or any(value > 0 for _, value in points)
  log = log and positive
  figure, axes = _figure()
  for (label, points), stage in zip(lines.items(), colours, strict=False):  # spare colours
    # A logarithm has no place for 0, which psi's norm is in a step without silent groups.
    points = [point for point in points if not log or point[1] > 0]
    _line(axes, points, label, stage, scale=100 if percent else 1)
  if log:
    axes.set_yscale('log')
    # Decades alone leave a narrow range with one label; 0.02 reads better than a power of ten.
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5), numticks=8))
    axes.yaxis.set_major_formatter('{x:g}')
    axes.yaxis.set_minor_locator(ticker.NullLocator())
  _finish_steps(axes, percent, legend=len(lines) > 1)
  return _to_inline_svg(figure, name)


def stacked_shares(name: str, layers: Mapping[str, Points], colours: Sequence[str]) -> str:
  """Shares (0..1) over steps, stacked: the upper edge is their sum.

  All layers have the same steps.
  """
  figure, axes = _figure()
  steps = [step for step, _ in next(iter(layers.values()))]
  # Layers are stacked by hand: several steps are drawn as areas, a single one as bars.
  base = np.zeros(len(steps))
  for (label, points), stage in zip(layers.items(), colours, strict=False):  # spare colours
    top = base + 100 * np.array([value for _, value in points])
    colour = _stage_colour(stage)
    # A single step has no width to fill: bars say the same.
    if len(steps) == 1:
      axes.bar(steps, top - base, 0.4, bottom=base, color=colour, alpha=0.75, label=label)
    else:
      axes.fill_between(steps, base, top, color=colour, alpha=0.75, linewidth=0, label=label)
    base = top
  axes.set_ylim(0, 100)
  _finish_steps(axes, percent=True, legend=True)
  return _to_inline_svg(figure, name)


def _line(axes: Axes, points: Points, label: str, stage: str, scale: float) -> None:
  if not points:
    return
  steps, values = np.array(points, float).T
  values = values * scale
  colour = _stage_colour(stage)
  # Noisy long curves get a moving mean on top of the thin raw line; short ones show their points.
  window = len(values) // 12
  if window >= 3:
    axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.35)
    kernel = np.ones(window)
    # Divided by the number of steps that each mean covers: fewer at both ends.
    smooth = np.convolve(values, kernel, 'same') / np.convolve(np.ones_like(values), kernel, 'same')
    axes.plot(steps, smooth, color=colour, linewidth=1.8, label=label, solid_capstyle='round')
  else:
    axes.plot(
      steps,
      values,
      color=colour,
      linewidth=1.8,
      label=label,
      marker='o',
      markersize=3.2,
      solid_capstyle='round',
    )


def _finish_steps(axes: Axes, percent: bool, legend: bool) -> None:
  # Steps are whole numbers; half a step would be a wrong label.
  axes.xaxis.set_major_locator(ticker.MaxNLocator(6, integer=True))
  axes.set_xlabel('step', color=_MUTED, fontsize=8.5)
  axes.margins(x=0.02)
  if percent:
    axes.yaxis.set_major_formatter('{x:.0f} %')
  if legend:
    _legend(axes)


def _legend(axes: Axes) -> None:
  if axes.get_legend_handles_labels()[0]:
    axes.legend(
      loc='lower left',
      bbox_to_anchor=(-0.01, 1.0),
      ncols=4,
      frameon=False,
      fontsize=8.5,
      labelcolor=_INK,
      handlelength=1.0,
      handletextpad=0.5,
      columnspacing=1.4,
      borderaxespad=0.2,
    )


def _stage_colour(stage: str) -> str:
  return STAGE_COLOURS.get(stage, _OTHER)


def _figure() -> tuple[Figure, Axes]:
  # Figure without pyplot: no global state, no window system, safe in threads.
  figure = Figure(figsize=_SIZE, layout='constrained')
  axes = figure.add_subplot()
  axes.patch.set_visible(False)
  figure.patch.set_visible(False)
  for side in ('top', 'left', 'right'):
    axes.spines[side].set_visible(False)
  axes.spines['bottom'].set_color(_MUTED)
  axes.tick_params(colors=_MUTED, labelsize=8.5, width=0.6, length=3)
  axes.tick_params(axis='y', length=0)
  axes.grid(axis='y', color=_RULE, linewidth=0.7)
  axes.set_axisbelow(True)
  return figure, axes


def _to_inline_svg(figure: Figure, name: str) -> str:
  """Returns the figure as an `<svg>` element that depends only on the page's CSS variables."""
  # Text stays text, and a fixed salt gives the same ids at each rendering.
  with matplotlib.rc_context({'svg.fonttype': 'none', 'svg.hashsalt': name}):
    buffer = io.StringIO()
    figure.savefig(buffer, format='svg')
  svg = buffer.getvalue()
  svg = svg[svg.index('<svg') :]
  svg = re.sub(r'<metadata>.*?</metadata>', '', svg, flags=re.DOTALL)
  svg = re.sub(r'<!--.*?-->', '', svg, flags=re.DOTALL)
  # A style element inside one SVG would apply to the whole page, and the font is the page's.
  svg = re.sub(r'<style.*?</style>', '', svg, flags=re.DOTALL)
  svg = re.sub(r' font-family: [^;"]*;', '', svg)
  svg = re.sub(r' xmlns(:\w+)?="[^"]*"', '', svg)
  # Ids are references within one chart; the prefix keeps two charts of a page apart.
  svg = re.sub(r'(\bid="|href="#|url\(#)', rf'\g<1>{name}-', svg)
  # The page sets the size; the viewBox keeps the proportions.
  svg = re.sub(r'^<svg([^>]*?) width="[^"]*"', r'<svg\1 role="img"', svg)
  svg = re.sub(r'^(<svg[^>]*?) height="[^"]*"', r'\1', svg)
  for colour, variable in _VARIABLES.items():
    svg = svg.replace(colour, f'var({variable})')
  return svg
