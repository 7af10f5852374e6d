"""Documents of a refined corpus side by side with what they were, as one HTML file that loads nothing."""

import difflib
import re
from collections.abc import Sequence

from datasel.methods.prox import audit, inspect, tables
from datasel.report import html
from datasel.report.html import Html, element

_WIDE = """
main{max-width:none}
body{max-width:96rem}
.filter{position:sticky;top:0;z-index:1;display:flex;flex-wrap:wrap;gap:.5rem .8rem;align-items:center;padding:.6rem 0;
background:var(--paper);border-bottom:1px solid var(--line);font-size:.9rem}
.filter input,.filter select{font:inherit;color:inherit;background:var(--panel);border:1px solid var(--line);
border-radius:.35rem;padding:.25rem .5rem;max-width:100%}
.filter input{flex:1 1 14rem}
"""
_CSS = """
.case{border:1px solid var(--line);border-radius:.5rem;margin:.7rem 0;padding:.5rem .8rem}
.case summary{font-weight:400;overflow-wrap:anywhere}
.case summary b{display:inline-block;min-width:4.5rem}
.dropped b{color:var(--out)}.edited b{color:var(--warn)}.kept b{color:var(--in)}
:root{--out:#b3261e;--in:#1a7f37;--outp:#ffebe9;--inp:#e6ffec;--outm:#ffc0ba;--inm:#abf2bc}
@media (prefers-color-scheme:dark){:root{--out:#ff938a;--in:#56d364;--outp:#3c1f1e;--inp:#12301b;--outm:#7d2f2a;
--inm:#1d6b35}}
.diff{width:100%;table-layout:fixed;font:.8rem/1.45 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
.diff td{text-align:left;white-space:pre-wrap;overflow-wrap:anywhere;vertical-align:top;border:0;padding:.05rem .5rem}
.diff td+td+td{border-left:1px solid var(--line)}
.diff .out{background:var(--outp)}.diff .in{background:var(--inp)}
.diff del{background:var(--outm);text-decoration:none}.diff ins{background:var(--inm);text-decoration:none}
.diff td{height:1.45em}.diff col.number{width:3.5rem}.diff td.number{text-align:right;color:var(--soft)}
.diff .fold td{color:var(--soft);text-align:center}
.case pre{font-size:.8rem;margin:.5rem 0}
"""
# Only this constant text is a script: nothing of a document is ever in it.
_SCRIPT = """
const cases=[...document.querySelectorAll('.case')],f=id=>document.getElementById(id);
const texts=cases.map(c=>c.textContent.toLowerCase());
function show(){let n=0;const q=f('q').value.toLowerCase();
cases.forEach((c,i)=>{const d=c.dataset;const yes=(!f('decision').value||d.decision===f('decision').value)
&&(!f('domain').value||d.domain===f('domain').value)&&(!f('reason').value||d.reason===f('reason').value)
&&texts[i].includes(q);c.hidden=!yes;n+=yes});f('n').textContent=n+' of '+cases.length;}
['q','decision','domain','reason'].forEach(id=>f(id).addEventListener('input',show));show();
"""
_COLUMNS = Html('<colgroup><col class="number"><col><col></colgroup>')
_WORDS = re.compile(r'\w+|\s+|.', re.DOTALL)
_LONGEST = 2000  # characters of a line in which changed words are marked
_OPEN = 3  # documents that are unfolded at first


def page(output: audit.Output, cases: Sequence[inspect.Case]) -> str:
  """The file.  Its script, for search and filters, is constant; without scripts everything is there to read."""
  settings, stated = output.manifest['settings'], output.statistics
  n = audit.n_documents(stated['total'])
  how = ' with the authors\' executor' if settings['compat'] else ''
  lead = html.paragraph(f'{len(cases):,} of {n:,} documents that {settings["refiner"]} refined{how}: what each was, '
                        'what is left of it, and the programs that made the difference.', class_='lead')
  body = element('div', _filter(cases), documents(cases, unfolded=_OPEN), element('style', Html(_WIDE)),
                 element('script', Html(_SCRIPT)))
  whole = element('pre', inspect.escaped(tables.statistics(stated, {})))
  return html.page('What was refined, and why', f'datasel · prox · {output.path.name}', lead,
                   [('Documents', body), ('All documents', whole)])


def documents(cases: Sequence[inspect.Case], *, unfolded: int = 0) -> Html:
  """The documents one after another, so many of them unfolded."""
  return element('div', *(_case(case, n < unfolded) for n, case in enumerate(cases)), element('style', Html(_CSS)))


def _filter(cases: Sequence[inspect.Case]) -> Html:
  chosen = {'decision': [case.record['decision'] for case in cases], 'domain': [case.domain for case in cases],
            'reason': [case.record['reason'] for case in cases]}
  selects = [element('select', element('option', f'every {name}', value=''),
                     *(element('option', value, value=value) for value in sorted(set(values))), id=name,
                     aria_label=name) for name, values in chosen.items()]
  search = Html('<input id="q" type="search" placeholder="search texts, programs, ids" aria-label="search">')
  return element('div', search, *selects, element('span', f'{len(cases)}', id='n', class_='soft'), class_='filter')


def _case(case: inspect.Case, unfolded: bool) -> Html:
  record = case.record
  rest = inspect.visible(f'{record["reason"]} · {case.domain} · {record["id"]} · {record["before"]["words"]:,} → '
                         f'{record["after"]["words"]:,} words')
  summary = element('summary', element('b', record['decision']), ' ', rest)
  rows = [_row(pair) for pair in inspect.folded(inspect.pairs(case))]
  programs = '\n'.join(map(inspect.visible, inspect.programs(case)))
  diff = element('table', _COLUMNS, element('tbody', *rows), class_='diff')
  return element('details', summary, element('pre', programs), diff, class_=f'case {record["decision"]}',
                 data_decision=record['decision'], data_domain=case.domain, data_reason=record['reason'],
                 **({'open_': 'open'} if unfolded else {}))


def _row(pair: inspect.Pair | int) -> Html:
  if isinstance(pair, int):
    return element('tr', element('td', f'{pair} lines as they were', colspan='3'), class_='fold')
  number = element('td', pair.number, class_='number')
  old, new = pair.old, pair.new
  if old == new:
    return element('tr', number, element('td', inspect.visible(old)), element('td', inspect.visible(new)))
  if new is None:
    return element('tr', number, element('td', inspect.visible(old), class_='out'), element('td'))
  left, right = _marked(old, new)
  return element('tr', number, element('td', *left, class_='out'), element('td', *right, class_='in'))


def _marked(old: str, new: str) -> tuple[list[str], list[str]]:
  """Both lines, with the words marked that are not in the other."""
  if max(len(old), len(new)) > _LONGEST:
    return [inspect.visible(old)], [inspect.visible(new)]
  a, b = _WORDS.findall(old), _WORDS.findall(new)
  left, right = [], []
  for kind, i, j, k, m in difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
    was, now = inspect.escaped(''.join(a[i:j])), inspect.escaped(''.join(b[k:m]))
    left.append(was if kind == 'equal' else element('del', was))
    right.append(now if kind == 'equal' else element('ins', now))
  return left, right
