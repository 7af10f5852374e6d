"""The sections of an AnLLM report on caches: accuracy against their entries, their growth, what is seen, and time."""

from collections.abc import Iterable, Sequence

from datasel.methods.anllm import pictures
from datasel.methods.anllm.pictures import Series
from datasel.report import plots
from datasel.report.html import Html, element, figure, panels, paragraph, table
from datasel.report.plots import GREY, Line
from datasel.report.sections import NONE, count, number, some

FULL = 'full'  # the arm without anchors
# What a row of `questions` was answered with: a name, and where `speed` has its time.
_CACHES = {'evicted': ('evicted', 'anchor_cache'), 'full': ('full cache', 'full_cache')}


def percent(part: float | None, digits: int = 1) -> str:
  return NONE if part is None else f'{100 * part:.{digits}f}%'


def error(row: dict) -> float:
  """One standard error of a row's accuracy; where all or none are right, half of Wilson's interval at one, for theirs
  would be 0."""
  return row['stderr'] if 0 < row['accuracy'] < 1 else 1 / (2 * (row['n'] + 1))


def colors(arms: Iterable[str]) -> dict[str, str]:
  """The colour of each arm, the same in all figures of the same arms."""
  looks = plots.palette({arm for arm in arms if arm != FULL})
  return {arm: GREY if arm == FULL else looks[arm][0] for arm in arms}


def questions(rows: Sequence[dict], timed: Sequence[dict]) -> Html:
  """Accuracy against cache entries for each set, and all of it in a table with the times of `speed`'s rows."""
  color = colors([row['arm'] for row in rows])
  sets = {name: [row for row in rows if row['set'] == name] for name in dict.fromkeys(row['set'] for row in rows)}
  return Html(paragraph(
    'Multiple choice, by the likelihood of each answer after the demonstrations and the question. The demonstrations '
    'are read once; then all but anchors and the open segment is really dropped, and every question goes on from what '
    'is left.') + panels(*(_asked(name, of, color) for name, of in sets.items()))
    + Html(''.join(_answers(name, of, timed) for name, of in sets.items())))


def _asked(name: str, rows: Sequence[dict], color: dict[str, str]) -> Html:
  groups: dict[tuple[str, str], list[dict]] = {}
  for row in sorted(rows, key=lambda row: row['shots']):
    groups.setdefault((row['arm'], row['cache']), []).append(row)
  drawn = [Series([row['live'] for row in of], [100 * row['accuracy'] for row in of],
                  [100 * error(row) for row in of], _with(arm, cache), color[arm],
                  hollow=cache == 'full' and arm != FULL) for (arm, cache), of in groups.items()]
  said = '; '.join(f'{one.label} {one.y[-1]:.1f}% from {one.x[-1]:,}' for one in drawn)
  chart = pictures.points(f'questions {name}', f'{plots.short(name, 40)}: accuracy by cache', drawn,
                          xlabel='cache entries of the demonstrations', ylabel='percent right',
                          level=100 * rows[0]['chance'])
  return figure(chart, alt=f'Percent right of {name} against cache entries, with most demonstrations: {said}',
                caption='Bars: one standard error over the questions, at 0% and 100% half of Wilson\'s interval; '
                'points that would hide one another are set apart. Rings: the same parameters with nothing masked or '
                'evicted. Dotted: chance.')


def _answers(name: str, rows: Sequence[dict], timed: Sequence[dict]) -> Html:
  seconds = {(row['arm'], row['shots'], cache): row[key] for row in timed if row['set'] == name
             for cache, (_, key) in _CACHES.items()}
  cells = [[f'{_with(row["arm"], row["cache"])}, {row["shots"]}-shot', count(row['prefix_tokens']),
            count(row['live']), percent(1 - row['live'] / row['prefix_tokens'] if row['prefix_tokens'] else None),
            _size(row['allocated_bytes']), percent(row['accuracy']), f'±{100 * error(row):.1f}',
            percent(row['accuracy_norm']), count(row['n']),
            number(seconds.get((row['arm'], row['shots'], row['cache'])), 4)] for row in rows]
  found = table(['arm, cache, demonstrations', 'tokens of these', 'cache entries', 'saved (C⇓)', 'buffers', 'right',
                 'error', 'right, per byte', 'questions', 'seconds a question'], cells,
                caption=f'{name}: accuracy, cache and time, of the same run; buffers: bytes set aside for the '
                        f'entries, slots in powers of two; chance is {percent(rows[0]["chance"])}')
  kept = [f'{row["arm"]}, {row["shots"]}-shot' for row in rows
          if row['cache'] == 'evicted' and row['live'] == row['prefix_tokens'] > 0]
  if not kept:
    return found
  return Html(found + paragraph(f'These demonstrations have no anchor that empties the cache, so all of them is kept: '
                                f'{"; ".join(kept)}.'))


def _with(arm: str, cache: str) -> str:
  return arm if arm == FULL else f'{arm}, {_CACHES[cache][0]}'


def growth(documents: Sequence[dict], caches: dict[str, dict]) -> Html:
  """Entries alive over documents, and what is saved by each way of counting."""
  rows = [[arm, percent(one['prefix']), percent(one['peak_live']), percent(one['allocated']),
           _size(one['allocated_bytes']), _size(one['full_bytes'])] for arm, one in caches.items()]
  parts = [panels(*map(_grown, documents))] if documents else []
  if rows:
    parts.append(table(
      ['arm', 'after the text', 'at its fullest', 'bytes of buffers', 'these', 'of a full cache'], rows,
      caption='Part of a cache of all tokens that is saved (C⇓) over these documents: entries once a text is read, '
              'entries when they are most, and bytes if buffers fitted exactly; their slots are powers of two'))
  return Html(''.join(parts))


def _grown(document: dict) -> Html:
  name, arms = document['name'], document['arms']
  color, end = colors(arms), 1 + max(one['at'][-1] for one in arms.values())
  lines = [Line([n + 1 for n in one['at']], one['live'], arm, color[arm], width=1.2)
           for arm, one in arms.items() if arm != FULL]
  final = some([f'{line.label} {line.y[-1]:,} of {line.x[-1]:,}' for line in lines], 6) or 'the full cache alone'
  whole = Line([0, end], [0, end], 'full cache', GREY, ':')
  chart = pictures.over(f'cache {name}', f'Cache entries over {plots.short(name, 30)}', [whole, *lines],
                        xlabel='tokens read', ylabel='entries alive')
  return figure(chart, alt=f'Cache entries alive over the tokens of {name}; at the end: {final}',
                caption=f'At the end: {final}. An open segment fills the cache; its anchor empties it of all else.')


def masks(documents: Sequence[dict], arms: dict[str, dict]) -> Html:
  """What each token of a document's beginning sees, a picture an arm: of the document that has most anchors there."""
  n_anchors = lambda document: sum(sum(one['anchor'][:pictures.MOST_TOKENS]) for one in document['arms'].values())
  document = max(documents, key=n_anchors)
  drawn = []
  for arm, one in document['arms'].items():
    switches = {key: bool(arms.get(arm, {}).get(key)) for key in ('anchor_sees_anchors', 'keep_bos')}
    n = min(len(one['tokens']), pictures.MOST_TOKENS)
    closing = some([f'“{token}”' for token, closes in zip(one['tokens'][:n], one['anchor']) if closes])
    said = f'segments end at {closing}' if closing else 'no segment ends here'
    drawn.append(figure(
      pictures.mask(one['tokens'], one['anchor'], **switches), caption=f'{arm}: {said}.',
      alt=f'Which of the first {n} tokens of {document["name"]} see which, with {arm}; {said}'))
  mark = lambda words, color: element('b', words, style=f'color:{color}')
  return Html(paragraph(
    f'The beginning of {document["name"]}. A row is a token that looks; its squares are what it sees: ',
    mark('its own segment', pictures.OWN), ', ', mark('anchors of those before', pictures.KEPT), ', ',
    mark('a token kept for all', pictures.PROTECTED), '. Grey was read before and is hidden: for good, but for earlier '
    'anchors in the row of an anchor, which does not see them unless its arm says so.') + panels(*drawn))


def speed(rows: Sequence[dict], asked: Sequence[dict]) -> Html:
  """Seconds a question against no cache and against a full one: never one without the other; buffers as in `asked`, the
  rows of `questions`."""
  names = [f'{row["arm"]}, {row["set"]}, {row["shots"]}-shot' for row in rows]
  look = colors([row['arm'] for row in rows])
  of = lambda key: [row[key] for row in rows]
  ratio = lambda row, key: f'×{row[key] / row["anchor_cache"]:.2f}'
  of_row = lambda row: (row['arm'], row['set'], row['shots'])
  buffers = {(*of_row(row), row['cache']): row['allocated_bytes'] for row in asked}

  def against(key: str, what: str) -> Html:
    ratios = some([f'{name} {ratio(row, key)}' for name, row in zip(names, rows)], 8)
    chart = plots.bars(f'speed {key}', f'Anchor cache against {what}', names, of(key), of('anchor_cache'),
                       [look[row['arm']] for row in rows], xlabel='seconds a question')
    return figure(chart, alt=f'Seconds a question with an anchor cache beside {what}; times faster: {ratios}',
                  caption=f'In colour: the anchor cache. Grey: {what}.')

  cells = [[name, count(row['prefix_tokens']), *(number(row[key], 4) for key in (
    'no_cache', 'full_cache', 'anchor_cache')), ratio(row, 'no_cache'), ratio(row, 'full_cache'),
            *(_size(buffers.get((*of_row(row), cache), 0)) for cache in ('full', 'evicted'))]
           for name, row in zip(names, rows)]
  return Html(paragraph(
    'The same questions with the demonstrations read anew for each (no cache), with all of them kept, and with their '
    'anchors kept. The ratio against no cache is what caching is worth at all; what anchors add to it is the ratio '
    'against a full cache.') + panels(against('no_cache', 'no cache'), against('full_cache', 'a full cache'))
    + table(['arm, set, demonstrations', 'tokens of these', 'no cache, s', 'full cache, s', 'anchor cache, s',
             'against no cache (T⇑)', 'against a full cache', 'buffers, full', 'buffers, anchors'], cells,
            caption='Seconds a question, medians without compilation; beside them the bytes that are set aside for '
                    'the demonstrations'))


def _size(n: int) -> str:
  """Of buffers; none are of no bytes."""
  if not n:
    return NONE
  return f'{n / 2**20:,.2f} MiB' if n >= 2**20 else f'{n / 2**10:,.1f} KiB'
