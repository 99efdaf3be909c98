"""The report's stylesheet."""

CSS = """
:root { --ink: #22262b; --muted: #6b7280; --line: #e3e1dc; --accent: #2b6ca3; --soft: #f7f6f3; }
* { box-sizing: border-box; }
html { scroll-behavior: smooth; }
body { margin: 0; background: #fff; color: var(--ink);
  font: 16px/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main, header .inner { max-width: 1080px; margin: 0 auto; padding: 0 28px; }
header { background: var(--soft); border-bottom: 1px solid var(--line); padding: 36px 0 24px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 6px; letter-spacing: -0.01em; }
h2 { font-size: 22px; margin: 52px 0 8px; letter-spacing: -0.005em; }
h3 { font-size: 16px; margin: 26px 0 6px; }
p { margin: 8px 0; max-width: 76ch; }
a { color: var(--accent); text-decoration: none; }
a:hover { text-decoration: underline; }
nav { margin-top: 16px; display: flex; flex-wrap: wrap; gap: 4px 18px; font-size: 14px; }
.lead { color: var(--muted); margin: 0; }
.cards { display: flex; flex-wrap: wrap; gap: 10px; margin: 22px 0 0; }
.card { border: 1px solid var(--line); background: #fff; border-radius: 8px; padding: 10px 16px; min-width: 116px; }
.card b { display: block; font-size: 21px; line-height: 1.25; font-variant-numeric: tabular-nums; }
.card span { font-size: 12.5px; color: var(--muted); }
.formula { font: 13.5px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; background: var(--soft);
  border-left: 3px solid var(--line); padding: 8px 14px; margin: 10px 0; overflow-wrap: anywhere; }
.headline { font-size: 16.5px; }
.fine { font-size: 13px; line-height: 1.5; color: var(--muted); max-width: 100ch; }
.notice { border: 1px solid #e6cf9a; background: #fdf7e6; border-radius: 8px; padding: 10px 16px; margin: 14px 0;
  font-size: 14.5px; }
.notice ul { margin: 4px 0; padding-left: 20px; }
figure { margin: 18px 0 10px; overflow-x: auto; }
figure img { display: block; max-width: 100%; height: auto; }
figcaption { font-size: 13px; line-height: 1.5; color: var(--muted); margin-top: 6px; max-width: 100ch; }
details { border-top: 1px solid var(--line); padding: 8px 0; }
details:last-of-type { border-bottom: 1px solid var(--line); }
summary { cursor: pointer; font-size: 14.5px; color: var(--accent); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 14px; margin: 12px 0; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 5px 18px 5px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 600; color: var(--muted); font-size: 12.5px; }
td.number, th.number { text-align: right; }
td small { color: var(--muted); font-size: 12px; white-space: nowrap; }
dl { display: grid; grid-template-columns: minmax(130px, 200px) 1fr; gap: 6px 20px; font-size: 14.5px; margin: 12px 0; }
dt { font-weight: 600; }
dd { margin: 0; overflow-wrap: anywhere; }
pre { background: var(--soft); border: 1px solid var(--line); border-radius: 8px; padding: 14px 18px; overflow-x: auto;
  font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
footer { border-top: 1px solid var(--line); margin-top: 56px; padding: 18px 0 44px; font-size: 13px;
  color: var(--muted); }
@media print { details { display: block; } nav { display: none; } }
"""
