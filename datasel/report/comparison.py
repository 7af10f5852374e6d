"""Two models that differ in the mixture alone, candidate against baseline: the outcome in words, tables and curves."""

from collections.abc import Sequence

from datasel.report import plots
from datasel.report.html import Html, figure, panels, paragraph, table
from datasel.report.plots import ACCENT, GREY, Line, signed
from datasel.report.sections import Artefacts, number, some

_TIE = 0.05  # percent: what rounds to 0.0%


def percent(loss: dict[str, float]) -> float:
  """Change of the candidate's loss against the baseline's."""
  return 100 * (loss['candidate'] / loss['baseline'] - 1)


def outcome(found: dict) -> str:
  """What `evaluate.compare` found for a tuned mixture, in words, whichever way it fell."""
  loss, steps, reached = found['uniform_nll'], found['baseline_steps'], found['steps_to_baseline']
  change = percent(loss)
  values = f'({loss["baseline"]:.3f} → {loss["candidate"]:.3f} nats/token)'
  won = f'{len(found["domains_won"])} of {found["domains"]} domains'
  at = f'the baseline\'s final loss at step {reached} of {steps}'
  if abs(change) < _TIE:
    return ('The tuned mixture ties with the baseline: the average held-out losses are equal to a tenth of a percent '
            f'{values}; it wins {won}.')
  if change < 0:
    sooner = f', {steps / reached:.2f} times sooner' if 0 < reached < steps else ''
    return (f'The tuned mixture lowers the average held-out loss by {-change:.1f}% {values} and wins {won}; '
            f'it reaches {at}{sooner}.')
  after = (f'never reaches the baseline\'s final loss in {steps} steps' if reached is None
           else f'reached {at}, but ends above it')
  return (f'The tuned mixture does not beat the baseline here: the average held-out loss is {change:.1f}% higher '
          f'{values}; it wins {won}, and {after}.')


def losses(run: Artefacts, baseline: str, tuned: str, order: Sequence[str],
           names: tuple[str, str] = ('baseline', 'tuned')) -> Html:
  """The section on the held-out losses of two stages, called `names`; `order` is that of the domains in its table."""
  lines = run.of(baseline, 'eval'), run.of(tuned, 'eval')
  if not all(lines):
    return paragraph('The main models were not trained or not evaluated: there is nothing to compare.')
  base, new = (evaluated[-1] for evaluated in lines)
  return Html(panels(_dots(base['nll'], new['nll'], order, names), _table(base, new, order, names))
              + panels(_learning(*lines, 'uniform_nll', 'Average over domains', names),
                       _learning(*lines, 'worst_nll', 'Worst domain', names)))


def _table(base: dict, new: dict, order: Sequence[str], names: tuple[str, str]) -> Html:
  before, after = names

  def row(name: str, a: float, b: float, a_bits: float, b_bits: float) -> list[str]:
    winner = after if b < a else before if a < b else 'tie'
    return [name, number(a), number(b), signed(b - a), number(a_bits), number(b_bits), winner]

  mean_bits = [sum(values['bits_per_byte'].values()) / len(order) for values in (base, new)]
  return table(
    ['domain', f'{before} nats/token', f'{after} nats/token', 'difference', f'{before} bits/byte',
     f'{after} bits/byte', 'winner'],
    [row(d, base['nll'][d], new['nll'][d], base['bits_per_byte'][d], new['bits_per_byte'][d]) for d in order],
    total=row('average', base['uniform_nll'], new['uniform_nll'], *mean_bits),
    caption='Held-out losses of the main models at their last step')


def _dots(base_nll: dict, new_nll: dict, order: Sequence[str], names: tuple[str, str]) -> Html:
  before, after = names
  looks, change = plots.palette(order), {d: new_nll[d] - base_nll[d] for d in order}
  ranked = sorted(order, key=change.get)
  lower = [f'{d} {signed(change[d])}' for d in ranked if change[d] < 0]
  svg = plots.differences('losses', f'Held-out loss, {after} − {before}', ranked, [change[d] for d in ranked],
                          [looks[d][0] for d in ranked], xlabel=f'nats/token (left: {after} is better)')
  return figure(
    svg, alt=f'Difference in held-out loss by domain; {after} is lower in: {some(lower) or "none"}',
    caption=f'Each domain\'s final held-out loss: {after} less {before}.')


def _learning(base: list[dict], tuned: list[dict], key: str, title: str, names: tuple[str, str]) -> Html:
  """The later part of both learning curves: the fall of the first steps would flatten what is to be compared."""
  last = base[-1]['step']
  late = [[line for line in lines if 5 * line['step'] >= last] for lines in (base, tuned)]
  curves = [Line([line['step'] for line in lines], [line[key] for line in lines], label=name, color=color, dots=True)
            for lines, name, color in zip(late, names, (GREY, ACCENT))]
  final = base[-1][key]
  said = ['Evaluated once, at the end: there is no curve.' if len(base) == 1 else f'Evaluated {len(base)} times.',
          f'Dotted: the final value of {names[0]}, {final:.3f}.']
  if len(late[0]) < len(base):
    said.append('The first fifth of the steps is left out.')
  return figure(
    plots.curves(f'learning {key}', title, curves, ylabel='held-out nats/token', level=final),
    alt=f'{title}: held-out loss up to step {last}; {names[0]} ends at {final:.3f}, '
    f'{names[1]} at {tuned[-1][key]:.3f}',
    caption=' '.join(said))
