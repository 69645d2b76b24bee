"""Procedural pictures of patterned steel plates, with built-in anomalies and their exact masks.

Stands in for the five plate datasets (SPEC section 1), whose pictures are an industrial partner's property. The
patterns are those of DIN EN 10363: teardrops with sharp ends (type T), teardrops with flattened ends (type A), diamonds
of crossing ribs (type R).

    images = plates.render(jax.random.key(0), "teardrop1", num=4)
    # The same four plates, dented:
    images, masks = plates.render_defective(jax.random.key(0), "teardrop1", "dent", num=4)
"""

from steel_ad.data.plates.lines import ANOMALIES, LINES, PATTERNS, Line
from steel_ad.data.plates.pictures import lattice, render, render_defective, render_each, to_uint8

__all__ = ["ANOMALIES", "LINES", "PATTERNS", "Line"]
__all__ += ["lattice", "render", "render_defective", "render_each", "to_uint8"]
