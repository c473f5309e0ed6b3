"""How pages and plots look, in light and in dark, on wide and on narrow windows."""

# Colours that people with any kind of colour vision tell apart: Okabe and Ito's, darker where paper is white, lighter
# where it is dark.
LIGHT = ("#0060a8", "#c84e00", "#00805d", "#a24b86", "#8a6d00", "#3d7ea6", "#7a3b00", "#555f6b")
_DARK = ("#6bb5f5", "#ff9b57", "#3fd0a4", "#e79bcd", "#e8c64a", "#9fd3f0", "#cf9468", "#a9b4c0")
COLOURS = len(LIGHT)

_PAPER_LIGHT = "--paper:#fff;--ink:#1c2430;--quiet:#5d6875;--line:#e3e7ec;--panel:#f6f8fa;"
_PAPER_DARK = "--paper:#12161c;--ink:#e4e9ef;--quiet:#97a3b0;--line:#2a323c;--panel:#1a2029;"


def _variables(paper: str, colours: tuple[str, ...]) -> str:
    return paper + "".join(f"--c{number}:{colour};" for number, colour in enumerate(colours))


_COLOURS = (
    f":root{{color-scheme:light dark;{_variables(_PAPER_LIGHT, LIGHT)}}}"
    f"@media(prefers-color-scheme:dark){{:root{{{_variables(_PAPER_DARK, _DARK)}}}}}"
)
_LINES = "".join(f".c{n}{{stroke:var(--c{n});background:var(--c{n})}}" for n in range(COLOURS))
_DRAWING = (
    "path{fill:none;stroke-width:2;vector-effect:non-scaling-stroke;stroke-linejoin:round;stroke-linecap:round}"
    "path.faint{stroke-width:1;opacity:.4}.dashed{stroke-dasharray:6 5}.second{stroke-dasharray:2 4}"
    "circle{fill:var(--paper);stroke-width:2}.grid{stroke:var(--line)}"
    ".mark{stroke:var(--quiet);stroke-dasharray:3 4}"
)
SVG_STYLE = (
    f"{_COLOURS}{_LINES}{_DRAWING}text{{font:12px system-ui,sans-serif;fill:var(--quiet)}}"
    ".title{font-weight:600;font-size:15px;fill:var(--ink)}.paper{fill:var(--paper)}"
)

PAGE_STYLE = (
    _COLOURS
    + _LINES
    + """
*{box-sizing:border-box}
body{font:15px/1.55 system-ui,-apple-system,"Segoe UI",sans-serif;color:var(--ink);background:var(--paper);
  max-width:68rem;margin:0 auto;padding:2rem 1.25rem 4rem}
h1{font-size:1.5rem;line-height:1.25;margin:0 0 .25rem;overflow-wrap:anywhere}
h2{font-size:1.1rem;margin:2.5rem 0 .75rem;padding-bottom:.35rem;border-bottom:1px solid var(--line)}
p{margin:.5rem 0}.quiet{color:var(--quiet)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(8.25rem,1fr));gap:.75rem;margin:1.5rem 0}
.tile{background:var(--panel);border:1px solid var(--line);border-radius:10px;padding:.7rem .9rem}
.tile b{display:block;font-size:1.2rem;font-weight:600;font-variant-numeric:tabular-nums}
.tile span{color:var(--quiet);font-size:.8rem;line-height:1.35;display:block}
.plots{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:1rem}
.plot{margin:0;border:1px solid var(--line);border-radius:10px;padding:.8rem 1rem 2rem;min-width:0}
.plot.wide,.plot:last-child:nth-child(even){grid-column:1/-1}
figcaption{display:flex;flex-wrap:wrap;gap:.1rem 1rem;justify-content:space-between;font-size:.9rem}
figcaption b{font-weight:600}.legend{display:flex;flex-wrap:wrap;gap:0 1rem;color:var(--quiet)}
.legend i{display:inline-block;width:.9rem;height:3px;border-radius:2px;margin-right:.4rem;vertical-align:middle}
.area{margin:.9rem .6rem 0 3.1rem;height:10.5rem}.wide .area{height:17rem}
.area>svg{width:100%;height:100%;overflow:visible;display:block}
svg text{font-size:12px;fill:var(--quiet);font-variant-numeric:tabular-nums}
"""
    + _DRAWING
    + """
table{border-collapse:collapse;font-variant-numeric:tabular-nums;width:100%}
th,td{text-align:left;padding:.35rem .9rem .35rem 0;border-bottom:1px solid var(--line);vertical-align:top;
  overflow-wrap:anywhere}
th{font-weight:500;color:var(--quiet)}thead th{font-size:.85rem;white-space:nowrap}
td.n,th.n{text-align:right}.facts th{width:14rem}.facts+.scroll{margin-top:1.5rem}.scroll{overflow-x:auto}
td i{display:inline-block;width:.9rem;height:3px;border-radius:2px;margin-right:.5rem;vertical-align:middle}
code,pre{font:13px/1.55 ui-monospace,SFMono-Regular,Menlo,monospace}
pre{background:var(--panel);border:1px solid var(--line);border-radius:8px;padding:.8rem 1rem;margin:.5rem 0;
  white-space:pre-wrap;overflow-wrap:anywhere}
.samples{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,26rem),1fr));gap:1rem}
.sample{border:1px solid var(--line);border-radius:10px;overflow:hidden}
.sample>div{padding:.5rem .9rem;display:grid;grid-template-columns:5.5rem minmax(0,1fr);gap:.75rem;
  white-space:pre-wrap;overflow-wrap:anywhere}
.sample>div+div{border-top:1px solid var(--line)}.sample .ask{background:var(--panel);font-weight:500}
.sample span{color:var(--quiet);font-size:.85rem;white-space:nowrap;font-weight:400}
.note{border-left:3px solid var(--c1);padding:.1rem .8rem;margin:.75rem 0}
@media(max-width:44rem){.plots{grid-template-columns:minmax(0,1fr)}.facts th{width:8.5rem}
  .sample>div{grid-template-columns:4.75rem minmax(0,1fr)}.wide .area{height:12rem}
  body{padding:1.25rem .9rem 3rem}}
@media print{body{max-width:none}.plot,.sample,.tile{break-inside:avoid}}
"""
)
