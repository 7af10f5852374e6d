"""The statistics of a refinement as text."""

from collections.abc import Mapping, Sequence
from typing import Any

from datasel.methods.prox import audit

_MOST = 20  # reasons of a decision


def statistics(stated: Mapping[str, Any], flops_per_token: Mapping[str, float]) -> str:
  """Of an output's statistics.json: the whole, and a line for each domain."""
  rows = [('domain', 'documents', *audit.DECISIONS, 'words', 'words left', '')]
  for name, counted in stated['domains'].items():
    words, left = (counted.get(when, {}).get('words', 0) for when in ('before', 'after'))
    rows.append((name, _n(audit.n_documents(counted)),
                 *(_n(counted.get('documents', {}).get(decision, 0)) for decision in audit.DECISIONS),
                 _n(words), _n(left), _share(left, words)))
  return f'{_columns(rows)}\n\n{total(stated["total"], flops_per_token)}'


def total(counted: Mapping[str, Any], flops_per_token: Mapping[str, float]) -> str:
  """Of some documents' statistics."""
  n = audit.n_documents(counted)
  if not n:
    return 'no documents'
  blocks = [[('documents', _n(n), ''), *((decision, _n(counted['documents'].get(decision, 0)),
                                          _share(counted['documents'].get(decision, 0), n))
                                         for decision in audit.DECISIONS)],
            [('', 'before', 'after', ''), *((size, _n(before), _n(counted['after'][size]),
                                             _share(counted['after'][size], before))
                                            for size, before in counted['before'].items())]]
  reasons = [(decision, reason, times) for decision, found in counted['reasons'].items()
             for reason, times in found.items()]
  reasons.sort(key=lambda row: (audit.DECISIONS.index(row[0]), -row[2], row[1]))
  blocks.append([('decision', 'reason', 'documents'), *((d, r, _n(t)) for d, r, t in reasons[:_MOST])])
  if len(reasons) > _MOST:
    blocks[-1].append(('', f'and {len(reasons) - _MOST} other reasons', ''))
  if counted['calls']:
    blocks.append([('call', 'what came of it', 'times'), *((call, kind, _n(times))
                                                           for call, kinds in counted['calls'].items()
                                                           for kind, times in kinds.items())])
  if counted['finished']:
    blocks.append([('programs ended by', 'chunks'), *((how, _n(times)) for how, times in counted['finished'].items())])
  before, after = (counted['lengths'][when] for when in ('before', 'after'))
  blocks.append([('fewer words than', 'before', 'after'),
                 *((_n(int(most)), _n(before.get(most, 0)), _n(after.get(most, 0)))
                   for most in sorted({*before, *after}, key=int))])
  cost = [(f'tokens {kind}, {stage}', _n(times)) for kind in ('read', 'generated')
          for stage, times in counted[kind].items() if times]
  if counted['truncated']:
    cost.append(('documents not read whole', _n(counted['truncated'])))
  if flops_per_token:
    cost.append(('FLOPs', f'{audit.flops(counted, flops_per_token):.3g}'))
  return '\n\n'.join(map(_columns, blocks + [cost] * bool(cost)))


def _columns(rows: Sequence[Sequence[str]]) -> str:
  """Aligned: numbers to the right."""
  widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
  numeric = [all(row[i][:1].isdecimal() or not row[i] for row in rows[1:]) for i in range(len(rows[0]))]
  return '\n'.join('  '.join(cell.rjust(width) if to_right else cell.ljust(width)
                             for cell, width, to_right in zip(row, widths, numeric)).rstrip() for row in rows)


def _n(value: int) -> str:
  return f'{value:,}'


def _share(part: int, whole: int) -> str:
  return f'{100 * part / whole:.1f} %' if whole else ''
