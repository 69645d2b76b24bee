"""The report of an inspection: one HTML file that opens offline, pictures and all."""

import base64
import html
from collections.abc import Mapping, Sequence
from typing import Any

_COLUMNS = (
    *("defect", "camera", "side", "image", "along_mm", "across_mm", "area_mm2", "length_mm", "width_mm"),
    *("along_px", "across_px", "area_px", "length_px", "width_px", "orientation_deg", "peak", "mean", "p_value"),
)

_STYLE = """
body{font:15px/1.45 system-ui,sans-serif;margin:2rem auto;max-width:74rem;padding:0 1rem;color:#222}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2rem}
.verdict{font-size:1.2rem;padding:.6rem 1rem;border-left:.4rem solid}
.clean{border-color:#009E73;background:#e8f5f0}.defects{border-color:#D55E00;background:#fbeee6}
table{border-collapse:collapse;font-size:.85rem}td,th{padding:.25rem .55rem;border-bottom:1px solid #ddd;text-align:left}
td.number{text-align:right;font-variant-numeric:tabular-nums}
#ledger th{cursor:pointer;position:sticky;top:0;background:#fff;white-space:nowrap}
#ledger th[aria-sort=ascending]::after{content:" \\25B2"}#ledger th[aria-sort=descending]::after{content:" \\25BC"}
.wide{overflow-x:auto}img{max-width:100%}td img{width:96px;image-rendering:pixelated;display:block}
code{overflow-wrap:anywhere}
"""

_SCRIPT = """
const table = document.getElementById("ledger");
if (table) table.tHead.addEventListener("click", event => {
  const head = event.target.closest("th");
  if (!head || head.dataset.fixed) return;
  const up = head.getAttribute("aria-sort") !== "ascending";
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  const key = row => row.cells[head.cellIndex].dataset.value;
  const rows = [...table.tBodies[0].rows].sort((a, b) => {
    const x = key(a), y = key(b), order = isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y;
    return up ? order : -order;
  });
  table.tBodies[0].append(...rows);
});
"""


def inspection(
    *,
    title: str,
    verdict: str,
    clean: bool,
    facts: Sequence[tuple[str, str]],
    pictures: Sequence[tuple[str, bytes]],
    rows: Sequence[Mapping[str, Any]],
    close_ups: Mapping[int, bytes],
    note: str = "",
) -> str:
    """The page, as text; it loads nothing from elsewhere.

    Args:
      verdict: in one sentence; `clean` gives its colour.
      facts: name and value, such as the settings, the model's hash and what the calibration promises.
      pictures: heading and PNG.
      rows: of the ledger, as `inspection.ledger.ordered` gives them; columns without a value are left out.
      close_ups: PNG by the row's `defect`.
      note: below the ledger.
    """
    columns = [c for c in _COLUMNS if any(r.get(c) not in (None, "") for r in rows)]
    # One unit is enough to look at; the files have both.
    columns = [c for c in columns if not (c.endswith("_px") and {f"{c[:-2]}mm", f"{c[:-2]}mm2"} & set(columns))]
    body = [f"<h1>{_text(title)}</h1>", f'<p class="verdict {"clean" if clean else "defects"}">{_text(verdict)}</p>']
    body += [f"<h2>{_text(heading)}</h2><img alt={_quoted(heading)} src={_data(png)}>" for heading, png in pictures]
    if rows:
        heads = "".join(f"<th>{_text(c.replace('_', ' '))}</th>" for c in columns)
        lines = "".join(
            f"<tr><td>{_image(close_ups.get(r['defect']))}</td>{''.join(_cell(r[c]) for c in columns)}</tr>"
            for r in rows
        )
        body.append(
            f'<h2>Defects</h2><div class="wide"><table id="ledger"><thead><tr><th data-fixed="1">close-up</th>{heads}</tr>'
            f"</thead><tbody>{lines}</tbody></table></div>"
        )
    if note:
        body.append(f"<p>{_text(note)}</p>")
    listed = "".join(f"<tr><th>{_text(name)}</th><td><code>{_text(value)}</code></td></tr>" for name, value in facts)
    body.append(f"<h2>How it was inspected</h2><table>{listed}</table>")
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{_text(title)}</title>'
        f"<style>{_STYLE}</style></head><body>{''.join(body)}<script>{_SCRIPT}</script></body></html>\n"
    )


def _text(value: str) -> str:
    return html.escape(str(value))


def _quoted(value: str) -> str:
    return f'"{html.escape(value, quote=True)}"'


def _data(png: bytes) -> str:
    return f'"data:image/png;base64,{base64.b64encode(png).decode()}"'


def _image(png: bytes | None) -> str:
    return "" if png is None else f'<img alt="" src={_data(png)}>'


def _cell(value: Any) -> str:
    if isinstance(value, int | float):
        shown = f"{value:d}" if isinstance(value, int) else f"{value:#.4g}".removesuffix(".")
        return f'<td class="number" data-value="{value!r}">{shown}</td>'
    shown = "" if value is None else str(value)
    return f"<td data-value={_quoted(shown)}>{_text(shown)}</td>"
