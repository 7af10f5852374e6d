"""Builds the HTML of a report: elements that cannot be left open, text that cannot be left unescaped.

A page is one file without scripts and without anything to load, for screens light and dark, phones, and paper.
"""

import html
import re
from collections.abc import Iterable, Sequence
from typing import Any

_VOID = ('meta',)
_CSS = """
:root{color-scheme:light dark;--ink:#1f2328;--soft:#59636e;--line:#d7dce1;--paper:#fff;--panel:#f6f8fa;
--accent:#0072b2;--warn:#9a5b00}
@media (prefers-color-scheme:dark){
:root{--ink:#e6e9ed;--soft:#9aa4af;--line:#363c44;--paper:#14171b;--panel:#1b1f25;
--accent:#56b4e9;--warn:#e6a23c}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:78rem;padding:1.5rem 1.1rem 4rem;background:var(--paper);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
h1{font-size:1.7rem;line-height:1.2;margin:.2rem 0}
h2{font-size:1.2rem;margin:2.6rem 0 .6rem;padding-top:.7rem;border-top:1px solid var(--line)}
p,li{max-width:46rem}
a{color:var(--accent)}
.soft,caption,figcaption{color:var(--soft);font-size:.875rem}
.lead{font-size:1.15rem;line-height:1.5}
nav{font-size:.875rem;line-height:2;display:flex;flex-wrap:wrap;column-gap:1rem}
nav a{white-space:nowrap}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(11rem,1fr));gap:.8rem;margin:1.2rem 0}
.tile{background:var(--panel);border:1px solid var(--line);border-radius:.5rem;padding:.7rem .9rem}
.tile b{display:block;font-size:1.45rem;line-height:1.25;font-variant-numeric:tabular-nums}
.tile span{display:block;color:var(--soft);font-size:.85rem;line-height:1.35}
.wide{overflow-x:auto;margin:1rem 0}
table{border-collapse:collapse;font-size:.875rem;font-variant-numeric:tabular-nums}
caption{text-align:left;padding-bottom:.4rem}
th,td{padding:.28rem .7rem .28rem 0;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th{font-weight:600;vertical-align:bottom}
thead th{white-space:normal}
th:first-child,.words td,.words th{text-align:left}
tbody th{font-weight:400}
tr.total>*{font-weight:600;border-top:2px solid var(--line)}
.words td{white-space:normal;overflow-wrap:anywhere;min-width:9rem}
.panels{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,27rem),1fr));
gap:1.2rem 1.6rem;margin:1.2rem 0;align-items:start}
.panels:has(table){grid-template-columns:repeat(auto-fit,minmax(min(100%,34rem),1fr))}
figure{margin:0;min-width:0}
figcaption{margin-top:.2rem}
svg{display:block;width:100%;max-width:36rem;height:auto}
svg *{stroke-linejoin:round;stroke-linecap:butt}
svg text{font-family:inherit!important}
.warnings li{color:var(--warn);margin:.4rem 0}
pre{background:var(--panel);border:1px solid var(--line);border-radius:.5rem;padding:.8rem;overflow-x:auto;
white-space:pre-wrap;overflow-wrap:anywhere;font-size:.85rem}
code{font-size:.9em}
details{margin:1rem 0}
summary{cursor:pointer;font-weight:600}
@media print{
:root{--ink:#000;--soft:#444;--line:#bbb;--paper:#fff;--panel:#fff;--accent:#000;--warn:#000}
body{max-width:none;padding:0;font-size:10pt}
.panels:not(:has(table)){grid-template-columns:1fr 1fr}
nav{display:none}
h2,caption,summary{break-after:avoid}
figure,.tile,tr,.panels table{break-inside:avoid}
.wide{overflow:visible}
details::details-content{content-visibility:visible;block-size:auto}}
"""


class Html(str):
  """Text that is already HTML.  Any other string is escaped when it is put into an element."""


def text(value: Any) -> Html:
  """Escapes; what no HTML file can hold (control characters, halves of surrogate pairs) becomes U+FFFD."""
  if isinstance(value, Html):
    return value
  visible = re.sub('[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]', '\ufffd', str(value))
  return Html(html.escape(visible))


def element(tag: str, *children: Any, **attributes: str) -> Html:
  """<tag ...>children</tag>; an attribute's trailing underscore is dropped, its others become hyphens."""
  names = ''.join(f' {name.rstrip("_").replace("_", "-")}="{text(value)}"' for name, value in attributes.items())
  return Html(f'<{tag}{names}>' if tag in _VOID else f'<{tag}{names}>{"".join(map(text, children))}</{tag}>')


def paragraph(*children: Any, class_: str = '') -> Html:
  return element('p', *children, **({'class_': class_} if class_ else {}))


def table(head: Sequence[Any], rows: Iterable[Sequence[Any]], *, caption: str, total: Sequence[Any] | None = None,
          words: bool = False) -> Html:
  """Rows of cells under `head`; the first cell names its row.  `words`: cells of text, wrapped and set to the left."""
  line = lambda cells, **more: element('tr', element('th', cells[0], scope='row'),
                                       *(element('td', cell) for cell in cells[1:]), **more)
  body = [line(row) for row in rows] + ([line(total, class_='total')] if total else [])
  names = element('tr', *(element('th', name, scope='col') for name in head))
  whole = element('table', element('caption', caption), element('thead', names), element('tbody', *body))
  return element('div', whole, class_='wide words' if words else 'wide')


def figure(svg: str, *, alt: str, caption: str) -> Html:
  """An <svg> element of `report.plots` with the words for who cannot see it, and a caption."""
  named = svg.replace('<svg ', f'<svg role="img" aria-label="{text(alt)}" ', 1)
  return element('figure', Html(named), element('figcaption', caption))


def panels(*figures: Html) -> Html:
  """Figures side by side where there is room."""
  return element('div', *figures, class_='panels')


def tiles(pairs: Iterable[tuple[str, str]]) -> Html:
  """(figure, what it is) at a glance."""
  return element('div', *(element('div', element('b', value), element('span', what), class_='tile')
                          for value, what in pairs), class_='tiles')


def page(title: str, subtitle: str, lead: Html, sections: Sequence[tuple[str, Html]]) -> str:
  """The whole file: `lead` on top, then (heading, body) with a list of links to them."""
  links = element('nav', *(element('a', name, href=f'#s{n}') for n, (name, _) in enumerate(sections)),
                  aria_label='Contents')
  body = [element('section', element('h2', name, id=f's{n}'), content) for n, (name, content) in enumerate(sections)]
  head = element('head', element('meta', charset='utf-8'),
                 element('meta', name='viewport', content='width=device-width, initial-scale=1'),
                 element('title', title), element('style', Html(_CSS)))
  main = element('body', element('main', paragraph(subtitle, class_='soft'), element('h1', title), lead, links, *body))
  return f'<!DOCTYPE html>\n<html lang="en">\n{head}\n{main}\n</html>\n'
