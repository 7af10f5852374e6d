"""The report of an AnLLM run: what anchors cost in loss and accuracy, and what they save of the cache and in time."""

import math
import pathlib
from collections.abc import Sequence
from typing import Any

from datasel import workdir
from datasel.methods.anllm import cache_sections, pictures
from datasel.methods.anllm.cache_sections import FULL, colors, error, percent
from datasel.report import lm_eval, plots, sections
from datasel.report.html import Html, element, figure, page, panels, paragraph, table, tiles
from datasel.report.plots import Line, signed
from datasel.report.sections import NONE, Artefacts, count, number, some

_CAVEATS = (
  'One model and one seed an arm: a small difference may be the seed\'s. The errors beside accuracies are those of '
  'asking other questions, no more.',
  'Losses are those of the whole text read at once under the mask. Decoding with an evicted cache computes the same, '
  'token for token. A model that was trained under a mask and is read without it (dashed) sees what it never saw.',
  'Anchors save what segments hold. Text without them, such as code or tables, is one long segment and keeps '
  'everything; and the cache still grows, by an entry a segment.',
  'All that follows knows a segment by one entry a layer. What asks for its very words loses most by that; perplexity '
  'and multiple choice hardly ask.',
)


def write_report(directory: pathlib.Path) -> pathlib.Path:
  """Writes DIRECTORY/report.html from the artefacts of a finished run; returns its path.

  Equal artefacts give equal bytes.  FileNotFoundError if the run has no summary.json; what evaluation.json lacks has no
  section on the page.
  """
  run = Artefacts(pathlib.Path(directory))
  found, losses = run.read('evaluation.json'), _losses(run)
  arms, caches, context = (found.get(key, {}) for key in ('arms', 'cache', 'context'))
  asked, timed = (found.get(key, []) for key in ('questions', 'speed'))
  documents = [document for document in found.get('documents', []) if document['arms']]
  content = [
    *([('The arms', _arms(arms, losses, run.read('config.json')))] if arms else []),
    *([('Held-out losses', _held_out(losses))] if losses else []),
    *([('Perplexity by context', _contexts(context, run.read('config.json')))] if context else []),
    *([('Questions', cache_sections.questions(asked, timed))] if asked else []),
    *([('What the cache holds', cache_sections.growth(documents, caches))] if documents or caches else []),
    *([('What a token sees', cache_sections.masks(documents, arms))] if documents else []),
    *([('Speed', cache_sections.speed(timed, asked))] if timed else []),
    *lm_eval.sections(run),
    ('Caveats', element('ul', *(element('li', said) for said in _CAVEATS))),
    ('Warnings', sections.warnings(run.summary.get('warnings', []))),
    ('Data', sections.data(run, [_stage(arm) for arm in losses])),
    ('Cost', sections.cost(run, run.summary.get('cost_flops', {}))),
    ('Repeat this run', sections.repeat(run)),
  ]
  path = run.directory / 'report.html'
  with workdir.replacing(path, 'w') as f:
    f.write(page('Attention through anchors', sections.subtitle(run, 'AnLLM'), _lead(found, losses), content))
  return path


def _stage(arm: str) -> str:
  return f'main-{arm}'


def _losses(run: Artefacts) -> dict[str, list[dict]]:
  """{arm: its evaluations while it trained, in order}."""
  arms = [stage.removeprefix(_stage('')) for stage in run.stages if stage.startswith(_stage(''))]
  return {arm: lines for arm in arms if (lines := run.of(_stage(arm), 'eval'))}


def _mean(line: dict, key: str) -> float:
  return sum(line[key].values()) / len(line[key])


def _lead(found: dict, losses: dict[str, list[dict]]) -> Html:
  bits = {arm: _mean(lines[-1], 'bits_per_byte') for arm, lines in losses.items()}
  anchored = [arm for arm in found.get('arms', losses) if arm != FULL]
  if not anchored:
    return paragraph('No model with anchors was trained: this is full attention alone, to compare others with.',
                     class_='lead')
  best = min(anchored, key=lambda arm: bits.get(arm, math.inf))
  said, shown = [], []
  if best in bits:
    said.append(f'held-out text costs {bits[best]:.3f} bits/byte{_against(bits, best)}')
    shown.append((number(bits[best]), f'bits/byte with {best}, mean over domains'))
    if FULL in bits:
      shown.append((signed(bits[best] - bits[FULL]), 'bits/byte against full attention'))
  documents = [document['arms'][best] for document in found.get('documents', []) if best in document['arms']]
  if documents and (saved := found.get('cache', {}).get(best)):
    tokens = sum(one['at'][-1] + 1 for one in documents)
    of = f'{len(documents)} document{"s" if len(documents) > 1 else ""} of {count(tokens)} tokens'
    said.append(f'of a full cache, {percent(1 - saved["prefix"])} is left when a text is read ({of} in all)')
    shown.append((percent(saved['prefix']), f'of the cache saved, once a text is read: {of} in all'))
  if asked := _asked(found.get('questions', []), best, 'evicted'):
    plain = _asked(found['questions'], FULL, 'full', asked)
    right = lambda row: (f'{percent(row["accuracy"])} (± {100 * error(row):.1f}) from {count(row["live"])} cache '
                         'entries')
    said.append(f'{asked["shots"]}-shot questions of {asked["set"]} are answered right at {right(asked)}'
                + (f', against {right(plain)} with full attention' if plain else ''))
    shown.append((percent(asked['accuracy']), f'of {asked["n"]:,} questions of {asked["set"]} right, '
                  f'{asked["shots"]}-shot, from an evicted cache'))
  which = f', the best of {len(anchored)} arms with anchors,' if len(anchored) > 1 and best in bits else ''
  return Html(paragraph(f'With {best}{which} {"; ".join(said) or "nothing was evaluated"}.', class_='lead')
              + tiles(shown) + paragraph(
    'What this can show: the arms share size, steps and initial parameters, and differ by what a token may see. '
    'What it cannot: each was trained with one seed, so a small difference may be the seed\'s.'))


def _against(bits: dict[str, float], arm: str) -> str:
  if FULL not in bits:
    return ''
  change = bits[arm] - bits[FULL]
  said = 'as much as' if abs(change) < 5e-4 else f'{abs(change):.3f} {"more" if change > 0 else "less"} than'
  return f', {said} with full attention ({bits[FULL]:.3f})'


def _asked(rows: Sequence[dict], arm: str, cache: str, like: dict | None = None) -> dict | None:
  """The row of this arm and cache that has most demonstrations, in its first set; or that is asked as `like` is."""
  own = [row for row in rows if (row['arm'], row['cache']) == (arm, cache)]
  if like is not None:
    own = [row for row in own if (row['set'], row['shots']) == (like['set'], like['shots'])]
  return max((row for row in own if row['set'] == own[0]['set']), key=lambda row: row['shots'], default=None)


def _same(whole: bool) -> str:
  """How far the text of all arms is one: a store with anchor tokens (ac) has other records than one without."""
  return 'of the same documents' if whole else 'of equally many records of the same corpus, evenly spread'


def _arms(arms: dict[str, dict], losses: dict[str, list[dict]], config: dict[str, Any]) -> Html:
  rows = []
  for name, arm in arms.items():
    last = losses[name][-1] if name in losses else None
    change = (_mean(last, 'bits_per_byte') - _mean(losses[FULL][-1], 'bits_per_byte')
              if last and FULL in losses and name != FULL else None)
    rows.append([name, _rule(arm), count(arm['vocab_size']), percent(arm['anchor_share'] if arm['rule'] else None, 2),
                 number(arm['mean_segment'] if arm['rule'] else None, 1),
                 number(_mean(last, 'bits_per_byte') if last else None), NONE if change is None else signed(change),
                 number(_mean(last, 'nll') if last else None)])
  return Html(table(
    ['arm', 'what closes a segment', 'vocabulary', 'anchors among tokens', 'tokens a segment', 'bits/byte',
     'against full', 'nats/token'], rows, caption='The arms; held-out losses at the last step, means over domains')
    + paragraph(f'Compare bits per byte: they are {_same(config.get("train.eval_sequences") == 0)}, and count what an '
                'anchor token costs. Nats per token cannot be compared where a text has anchor tokens of its own (ac): '
                'these are many, and easily guessed.'))


def _rule(arm: dict[str, Any]) -> str:
  rule, said = arm['rule'], []
  if rule is None:
    return 'nothing'
  if ids := rule['anchor_ids']:
    said.append(f'token{"s" if len(ids) > 1 else ""} {some(list(map(str, ids)), 6)}')
  if rule['min_length'] > 1:
    said.append(f'from {rule["min_length"]} tokens on')
  if rule['max_length'] is not None:
    said.append(f'{rule["max_length"]} tokens at most')
  switches = (('anchor_sees_anchors', 'anchors see earlier ones'), ('keep_bos', 'the first token is kept'))
  return '; '.join([*said, *(words for key, words in switches if arm[key])])


def _held_out(losses: dict[str, list[dict]]) -> Html:
  color, last = colors(losses), {arm: lines[-1] for arm, lines in losses.items()}
  curves = [Line([line['step'] for line in lines], [_mean(line, 'bits_per_byte') for line in lines], arm, color[arm],
                 dots=True) for arm, lines in losses.items()]
  final = some([f'{arm} {_mean(line, "bits_per_byte"):.3f}' for arm, line in last.items()], 8)

  def by_domain(key: str, unit: str) -> Html:
    rows = [[domain, *(number(line[key].get(domain)) for line in last.values())]
            for domain in sorted({domain for line in last.values() for domain in line[key]})]
    return table(['domain', *last], rows, total=['average', *(number(_mean(line, key)) for line in last.values())],
                 caption=f'Held-out loss by domain at the last step, {unit}')

  once = max(map(len, losses.values())) == 1
  return Html(panels(
    figure(plots.curves('bits', 'Held-out loss, mean over domains', curves, ylabel='bits/byte'),
           alt=f'Held-out bits per byte of each arm by step; at the end {final}',
           caption=f'{"Evaluated once, at the end: there is no curve. " if once else ""}Each arm under its own mask.'),
    by_domain('bits_per_byte', 'bits/byte'))
    + element('details', element('summary', 'In nats per token'), by_domain('nll', 'nats/token')))


def _contexts(context: dict[str, dict], config: dict[str, Any]) -> Html:
  color = colors(context)
  drawn = [(arm if arm == FULL or kind == 'masked' else f'{arm}, no mask', color[arm], kind != 'masked' and arm != FULL,
            sorted((int(length), values) for length, values in of.items()))
           for arm, kinds in context.items() for kind, of in sorted(kinds.items(), reverse=True)]

  def curve(key: str, title: str, ylabel: str, caption: str, value=lambda x: x) -> Html:
    lines = [Line([length for length, _ in of], [value(values[key]) for _, values in of], name, look,
                  '--' if dashed else '-', dots=True) for name, look, dashed, of in drawn]
    final = some([f'{line.label} {line.y[-1]:.3f}' for line in lines], 8)
    return figure(pictures.over(f'context {key}', title, lines, xlabel='context, tokens', ylabel=ylabel, log=True),
                  alt=f'{title}; at the longest: {final}', caption=caption)

  rows = [[f'{name}, {length:,}', *(number(values[key]) for key in ('bits_per_byte', 'nll', 'nll_without_anchors',
                                                                    'ppl'))]
          for name, _, _, of in drawn for length, values in of]
  longest = max(length for *_, of in drawn for length, _ in of)
  whole = config.get('anllm.context_sequences') == 0 and config.get('data.length') == longest
  return Html(paragraph(
    'Held-out text, the same at each length: cut into windows of it, each read afresh from its first token. What '
    f'different arms read is {_same(whole)}. Dashed: the same parameters without the mask.') + panels(
      curve('bits_per_byte', 'Bits per byte by context', 'bits/byte', 'Of all that is predicted.'),
      curve('nll_without_anchors', 'Perplexity by context', 'perplexity',
            'Of tokens of the text: anchor tokens of their own (ac) are left out.', math.exp))
    + element('details', element('summary', 'The numbers'), table(
      ['arm, context', 'bits/byte', 'nats/token', 'the same but for anchor tokens', 'perplexity of all tokens'], rows,
      caption='Losses by context')))
