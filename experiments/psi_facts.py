"""Prints every number of docs/psi.md:

    python -m experiments.psi_facts

They are exact, but for Adam's, which are means of simulated runs. It takes a few seconds.
"""

from collections.abc import Sequence
from typing import Any

from dcore_jax.learn import psi_theory as theory
from dcore_jax.run import program

# A token that helps in each of the three: probabilities of right after it and without it.
PROMPTS = {'easy': (0.95, 0.85), 'middle': (0.6, 0.4), 'hard': (0.3, 0.08)}
WORD = (0.2, 0.8)
SHARES = (0.05, 0.13, 0.25, 0.4, 0.5, 0.6, 0.75, 0.9, 0.95)
SIZES = {'H .03, alpha .1': 0.003, 'H .3, alpha .1': 0.03, 'H .3, alpha .4': 0.12, 'the cap': 0.5}


def _show(title: str, head: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
  print(f'\n{title}\n')
  print('| ' + ' | '.join(head) + ' |')
  print('|' + '---|' * len(head))
  for row in rows:
    cells = [f'{cell:+.5f}' if isinstance(cell, float) else str(cell) for cell in row]
    print('| ' + ' | '.join(cells) + ' |')


def show_means() -> None:
  """Prints the tables of sections 2 and 3: directions and sizes."""
  rules = {
    'every group': theory.every_group,
    'as published': theory.psi_alone(theory.PUBLISHED),
    'wrong ignored': theory.psi_alone(theory.WRONG_IGNORED),
    'on the word alone': theory.on_the_word,
    'GRPO': theory.GRPO,
  }
  rows = []
  for name, r in PROMPTS.items():
    q = WORD[0] * r[0] + WORD[1] * r[1]
    means = [float(theory.mean_gradient(WORD, r, rule)[0]) for rule in rules.values()]
    rows.append((name, f'{q:.3f}', *means, float(theory.uniform_ascent(WORD, r)[0])))
  head = ('prompt', 'q', *rules, 'grad P(uniform) / G')
  _show('Mean gradient on the logit of a word that helps (psi = 1)', head, rows)
  rows = []
  for q in SHARES:
    c, kappa = theory.uniform_factor(q), theory.grpo_factor(q)
    shares = [f'{100 * psi * c / kappa:+.2f} %' for psi in SIZES.values()]
    rows.append((f'{q}', theory.uniform_share(q), c, kappa, *shares))
  head = ('q', 'P(uniform)', 'c(q)', 'kappa(q)', *(f'psi {v} ({k})' for k, v in SIZES.items()))
  _show("Mean of psi relative to GRPO's, psi c(q) / kappa(q)", head, rows)


def show_practice() -> None:
  """Prints the tables of sections 4 and 6: what practice adds, and two KL terms."""
  old = (0.7, 0.25, 0.05)
  rows = []
  for now in (old, (0.65, 0.25, 0.10), (0.78, 0.20, 0.02)):
    rows.append((list(now), *map(float, theory.clipped_gradient(old, now))))
  _show(f'Clipping: the old policy is {list(old)}', ('policy now', *'abc'), rows)
  rows = []
  for sequences in (1, 8, 64):
    biases = [theory.length_bias(200, 100, sequences, how) for how in ('token', 'sequence', 'dr')]
    rows.append((sequences, *biases))
  head = ('sequences', 'token', 'sequence', 'dr')
  _show('Aggregation: towards 200 tokens (+) or 100 (-), by p (1 - p)', head, rows)
  rows = []
  for p in (0.1, 0.03, 0.01):
    drifts = [theory.adam_drift(p, updates) for updates in (8, 32, 64)]
    # A long run's mean needs fewer runs for the same error.
    drifts.append(theory.adam_drift(p, 1000, runs=400))
    rows.append((f'{p}', *(f'{mean:+.3f} ± {error:.3f}' for mean, error in drifts)))
  head = ('p', '8 updates', '32', '64', '1000')
  _show('Adam: mean step on a rare logit, learning rates an update', head, rows)
  rows = [(list(p), theory.entropy_change(p)) for p in ((0.5, 0.5), (0.7, 0.3), (0.9, 0.1))]
  _show('Second order: one step of size 1, psi = 1', ('p', 'E[change of H], nats'), rows)
  rows = [(name, *pushes.values()) for name, pushes in theory.kl_pushes().items()]
  head = ('term', '20 likely others', '559 unlikely tokens', '60 ids without a token')
  _show('Where a KL term pushes mass', head, rows)


def main() -> None:
  """Prints the tables."""
  show_means()
  show_practice()


if __name__ == '__main__':
  program.run(main)
