"""Defects labelled on plain steel, cut out and inserted into plates with their exact masks (SPEC section 1, rows 5, 6).

    library, skipped = defects.load("strip-defects")
    train, test = defects.split(library, 0.3, seed=0)
    images, masks = defects.insert(key, plates, train, probability=0.5)

A defect is kept as its cut-out and as its difference from its own background, which fades out over a few pixels around
the label. Inserting adds the difference (or pastes the cut-out) at a random place, flipped at random, on the device and
inside the jitted step. `procedural` draws a library where there are no pictures of defects. `alter` makes defects of the good
plates themselves.
"""

from steel_ad.data.defects.draw import KINDS, procedural
from steel_ad.data.defects.insertion import AUGMENTS, BLENDS, insert, insert_periodic
from steel_ad.data.defects.library import Library, check_disjoint, fitting, load, resized, split, split_record, without
from steel_ad.data.defects.line import alter

__all__ = ["AUGMENTS", "BLENDS", "KINDS", "alter", "insert", "insert_periodic", "procedural"]
__all__ += ["Library", "check_disjoint", "fitting", "load", "resized", "split", "split_record", "without"]
