"""The look of the HTML report: on wide and narrow screens, light and dark, and on paper."""

STYLE = """\
:root {
  color-scheme: light dark;
  --ink: #1f2328; --soft: #6a737d; --line: #d5d9de; --faint: #f4f5f7; --page: #ffffff; --mark: #b3261e;
}
@media screen and (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e6; --soft: #9aa2ab; --line: #3a4048; --faint: #1e2227; --page: #15181c; --mark: #ff8a80; }
}
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif;
}
main { max-width: 56rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 1.5rem; }
h2 { font-size: 1.25rem; margin: 3rem 0 0.5rem; padding-bottom: 0.3rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 2.25rem 0 0.5rem; }
p { margin: 0.5rem 0; max-width: 44rem; }
table + p, .wide + p, figure + p, .wide ~ p { font-size: 0.875rem; color: var(--soft); }
.wide { overflow-x: auto; margin: 0.75rem 0 1rem; }
table { border-collapse: collapse; font-size: 0.875rem; line-height: 1.3; border-block: 2px solid var(--ink); }
th, td { padding: 0.3rem 0.75rem; text-align: left; vertical-align: baseline; }
td:first-child { min-width: 7.5rem; }
td.number:first-child { min-width: 0; }
td:first-child, thead tr:last-child th:first-child { position: sticky; left: 0; background: var(--page); }
th { font-weight: 600; }
thead tr:last-child th { border-bottom: 1px solid var(--ink); }
th.over { text-align: center; }
.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
.whole { white-space: nowrap; }
.muted { color: var(--soft); }
tr.group th { padding-top: 0.7rem; background: var(--faint); font-weight: 600; }
tbody + tbody tr:first-child > * { border-top: 1px solid var(--line); }
b { font-weight: 700; }
.spread { display: inline-block; min-width: 3.4em; padding-left: 0.35em; text-align: left; }
.mark { display: inline-block; width: 1.3em; color: var(--mark); }
figure { margin: 1rem 0; }
img { max-width: 100%; height: auto; }
@media (max-width: 40rem) {
  body { font-size: 15px; }
  main { padding: 1rem 0.75rem 3rem; }
  th, td { padding: 0.3rem 0.4rem; }
  td:first-child { min-width: 5.5rem; }
  tr > :first-child { padding-left: 0.15rem; }
  .spread { min-width: 3.2em; padding-left: 0.25em; }
}
@media print {
  main { max-width: none; padding: 0; }
  .wide { overflow: visible; }
  table, figure, tr { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
}
"""
