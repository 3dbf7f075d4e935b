"""The look of a report's page: no file beside it, light or dark as its reader's system, wide or narrow."""

# Okabe and Ito's colours, which the colour-blind can tell apart, lighter on a dark ground.
_LIGHT = """
  --page: #f7f7f5; --card: #ffffff; --ink: #1c1f23; --soft: #5c646d; --line: #e2e3e0; --track: #ececea;
  --first: #0072b2; --second: #b45f06; --rest: #8b939b; --good: #0072b2; --plain: #9aa2aa;
  --chosen: #00785a; --bad: #c9480c; --heat: #0072b2;
"""
_DARK = """
  --page: #131517; --card: #1b1e21; --ink: #e8e9ea; --soft: #a0a7ae; --line: #2e3338; --track: #2a2f34;
  --first: #56b4e9; --second: #e69f00; --rest: #848d95; --good: #56b4e9; --plain: #78828b;
  --chosen: #35d0a2; --bad: #ff8552; --heat: #2b87bd;
"""
STYLE = f"""
:root {{ color-scheme: light dark; {_LIGHT} }}
@media (prefers-color-scheme: dark) {{ :root {{ {_DARK} }} }}
* {{ box-sizing: border-box; }}
body {{ margin: 0; background: var(--page); color: var(--ink); line-height: 1.5;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif; }}
main {{ max-width: 1160px; margin: 0 auto; padding: 40px 24px 64px; }}
h1 {{ font-size: 1.75rem; line-height: 1.2; margin: 0 0 .3rem; letter-spacing: -.015em; overflow-wrap: anywhere; }}
h2 {{ font-size: 1.02rem; margin: 0 0 .6rem; letter-spacing: -.005em; }}
p {{ margin: 0; }}
.over {{ font-size: .8rem; letter-spacing: .07em; text-transform: uppercase; color: var(--soft);
  margin-bottom: .5rem; }}
.lead {{ color: var(--soft); max-width: 48rem; overflow-wrap: anywhere; }}
.notice {{ border-left: 4px solid var(--bad); background: var(--card); padding: .7rem 1rem; margin-top: 1.2rem; }}
.facts {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(158px, 1fr)); gap: 1px; margin: 1.8rem 0 1rem;
  background: var(--card); border: 1px solid var(--line); border-radius: 10px; overflow: hidden; }}
.fact {{ box-shadow: 0 0 0 1px var(--line); padding: 1rem 1.15rem; }}
.fact dt {{ font-size: .82rem; color: var(--soft); }}
.fact dd {{ margin: 0; }}
.fact .value {{ font-size: 1.7rem; line-height: 1.3; font-weight: 620; font-variant-numeric: tabular-nums;
  letter-spacing: -.02em; }}
.fact .note {{ font-size: .82rem; color: var(--soft); }}
.fact.main .value {{ color: var(--chosen); }}
.warning {{ font-size: .9rem; color: var(--soft); max-width: 56rem; margin-bottom: 1.8rem; }}
.figures {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); gap: 20px; }}
.figures > :last-child:nth-child(odd) {{ grid-column: 1 / -1; }}
.figures > :last-child:nth-child(odd) svg {{ max-width: 560px; }}
figure, section {{ margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 1.1rem 1.2rem; min-width: 0; }}
section {{ margin-top: 20px; }}
figure {{ display: flex; flex-direction: column; }}
figcaption {{ font-size: .84rem; color: var(--soft); margin-top: auto; padding-top: .7rem; }}
.none figcaption {{ font-size: .95rem; margin: auto 0; padding: 1.2rem 0; }}
svg {{ width: 100%; height: auto; display: block; overflow: visible; }}
svg text {{ font-size: 12.5px; fill: var(--soft); font-variant-numeric: tabular-nums; }}
svg .label {{ font-weight: 560; fill: var(--ink); }}
svg .chosen-text {{ fill: var(--chosen); font-weight: 680; }}
svg .good-text {{ fill: var(--good); }}
path {{ fill: none; }}
.grid {{ stroke: var(--line); }}
.chance, .rung {{ stroke: var(--soft); stroke-dasharray: 3 4; }}
.link {{ stroke: var(--good); opacity: .35; }}
.chosen-link {{ stroke: var(--chosen); opacity: .8; stroke-width: 1.6; }}
.spread {{ stroke: var(--soft); stroke-width: 1.5; }}
.mark {{ stroke: var(--card); stroke-width: 1.2; }}
.plain {{ fill: var(--plain); }}
.good {{ fill: var(--good); }}
.chosen {{ fill: var(--chosen); }}
.bad, .mark.bad {{ stroke: var(--bad); stroke-width: 2.4; fill: none; stroke-linecap: round; }}
.curve {{ stroke-width: 1.5; stroke-linejoin: round; }}
.plain-curve {{ stroke: var(--plain); opacity: .75; }}
.good-curve {{ stroke: var(--good); }}
.chosen-curve {{ stroke: var(--chosen); stroke-width: 2.6; }}
.bad-curve {{ stroke: var(--bad); opacity: .85; }}
.first {{ fill: var(--first); }}
.second {{ fill: var(--second); }}
.rest {{ fill: var(--rest); }}
.first-line {{ stroke: var(--first); stroke-width: 2; }}
.second-line {{ stroke: var(--second); stroke-width: 2; }}
.band {{ opacity: .16; }}
.track {{ fill: var(--track); }}
.strong-track {{ fill: var(--plain); }}
.heat {{ fill: var(--heat); stroke: none; }}
.heat.picked {{ stroke: var(--chosen); stroke-width: 3; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; width: 100%; font-size: .88rem; font-variant-numeric: tabular-nums; }}
th {{ text-align: left; font-weight: 560; color: var(--soft); white-space: nowrap; }}
th, td {{ padding: .38rem .7rem .38rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }}
tbody tr:last-child :is(th, td) {{ border-bottom: 0; }}
td {{ white-space: nowrap; }}
.n {{ text-align: right; }}
td.why {{ min-width: 14rem; white-space: normal; overflow-wrap: anywhere; color: var(--soft); }}
td svg {{ width: 16px; height: 16px; display: inline-block; vertical-align: -3px; margin-right: .35rem; }}
tr.picked td {{ font-weight: 650; }}
.settings th {{ padding-right: 1.5rem; vertical-align: top; }}
.settings td {{ overflow-wrap: anywhere; white-space: pre-wrap; width: 100%; }}
footer {{ margin-top: 1.6rem; font-size: .82rem; color: var(--soft); }}
@media (max-width: 560px) {{
  main {{ padding: 24px 12px 40px; }}
  .facts {{ grid-template-columns: 1fr 1fr; }}
  figure, section {{ padding: .9rem .8rem; }}
  svg text {{ font-size: 17px; }}
}}
@media print {{ body {{ background: none; }} figure, section {{ break-inside: avoid; }} }}
"""


def highlight(numbers: list[int]) -> str:
    """Rules by which a run that is pointed at, in a figure or in the table, stands out in all of them."""
    rules = [
        f"main:has(.run-{n}:hover) :is(.mark, .curve, .link):not(.run-{n}) {{ opacity: .13; }}\n"
        f"main:has(.run-{n}:hover) tr.run-{n} {{ background: var(--track); }}"
        for n in numbers
    ]
    return "\n".join(rules)
