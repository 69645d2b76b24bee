"""Does a defect come back along the strip with a period, as from a damaged roll?

A roll prints its damage once a turn at the same place across. The positions along the strip of defects that share a place (and,
if asked for, a look) are compared with lattices of every admissible period. A periodogram proposes lattices, and a likelihood
with false and missed detections decides between them. Surrogate strips, with the same number of defects at places redrawn along
the strip, say how often chance does as well.

The p-value is exact for defects that lie independently and uniformly along the strip, whatever their places across and looks.
Pieces of one defect do not lie independently. So defects that lie together count as one, and so do the defects of one turn, in the
strip and in its surrogates alike; and a period needs enough turns that were hit.

Sources: Rayleigh's periodogram for point events (Brazier 1994); Monte Carlo tests, Davison and Hinkley 1997, chapter 4.
"""

import dataclasses
import math

import numpy as np
from numpy.typing import ArrayLike

# The share of the defects at one place that the roll is assumed to have made; the share of its turns assumed to be seen.
_SHARE = 0.8
_SEEN = 0.8
_LEAST_SEEN = 0.5
_LEAST_MEMBERS = 5
# Cells of the periodogram a turn.
_OVERSAMPLING = 4
# Nats that each missing member or turn costs.
_LACKING = 5.0
# Defects of one place that are closer, as a share of the shortest period, are pieces of one defect.
_PIECES = 0.1
# Distance from the lattice, in jitters, within which a defect belongs to a turn.
_REACH = 3.5
# Surrogates times turns in memory.
_AT_ONCE = 2**17
# Peaks of the periodogram that are tried, and the widths of the likelihood with which they are refined, in jitters.
_PEAKS = 4
_WIDTHS = (8.0, 4.0, 2.0, 1.0, 1.0)


@dataclasses.dataclass(frozen=True)
class Recurrence:
    """What `find` says of a strip.

    Attributes:
      p_value: share of the surrogate strips, with this strip among them, that have a period at least as good.
      periodic: whether `p_value` is at most the level asked for, and turns enough were hit: five, and half of them.
      period_mm: from turn to turn.
      phase_mm: of the first turn on the strip, in [0, period).
      members: indices of the defects that the roll made, in order along the strip.
      turns: turns on the strip, seen or missed.
      seen: turns with a member.
    """

    p_value: float
    periodic: bool
    period_mm: float
    phase_mm: float
    members: tuple[int, ...]
    turns: int
    seen: int

    @property
    def roll_diameter_mm(self) -> float:
        """Of a roll with the period as its circumference."""
        return self.period_mm / math.pi


def find(
    along_mm: ArrayLike,
    across_mm: ArrayLike,
    length_mm: float,
    *,
    tolerance_mm: float = 10.0,
    look: ArrayLike | None = None,
    look_tolerance: float = 1.0,
    jitter: float = 0.015,
    least_turns: int = 6,
    pitch_mm: float | None = None,
    level: float = 0.001,
    surrogates: int = 999,
    seed: int = 0,
) -> Recurrence | None:
    """The period of the defects of one strip, the best where there are several, with its p-value.

    Args:
      along_mm: positions `[n]` along the strip, in [0, length_mm].
      across_mm: positions `[n]` across.
      length_mm: of the strip.
      tolerance_mm: two defects share a place if they are no further apart across.
      look: descriptors `[n, k]`, such as log area and log length, or None.
      look_tolerance: two defects look alike if no descriptor differs by more.
      jitter: standard deviation of a position about its turn, as a share of the period; 0.001..0.05.
      least_turns: a period comes at least so often on the strip, >= 4.
      pitch_mm: of the plate's own pattern along the strip. Surrogates are then moved by whole pitches, so that detections
        tied to the pattern are no evidence, and periods below two and a half pitches are not considered. Higher multiples of
        the pitch remain possible: the roll that embosses the pattern has one of them as its circumference.
      level: of the test.
      surrogates: number of redrawn strips; the least p-value is 1 / (surrogates + 1).

    Returns:
      None where no place has the five defects that a period takes.

    Raises:
      ValueError: arrays that do not fit together, positions beyond the strip, or options out of range.
    """
    along, across = np.asarray(along_mm, np.float64), np.asarray(across_mm, np.float64)
    looks = np.zeros((along.size, 0)) if look is None else np.asarray(look, np.float64)
    if along.ndim != 1 or across.shape != along.shape or looks.shape[:1] != along.shape or looks.ndim != 2:
        raise ValueError(f"along {along.shape}, across {across.shape} and look {looks.shape} do not fit together")
    if not (length_mm > 0 and ((along >= 0) & (along <= length_mm)).all()):
        raise ValueError(f"a position is not on the strip of {length_mm} mm")
    if not (0.001 <= jitter <= 0.05 and least_turns >= 4 and surrogates >= 1 and (pitch_mm is None or pitch_mm > 0)):
        raise ValueError("jitter must lie in 0.001..0.05, least_turns be at least 4, surrogates and pitch_mm positive")
    y = along / length_mm
    pitch = None if pitch_mm is None else pitch_mm / length_mm
    places = _places(across, looks, tolerance_mm, look_tolerance)
    rng = np.random.default_rng([seed, 0x2011])
    best = _best([(members, y[members]) for members in places], pitch, least_turns, jitter, surrogates, rng)
    if best is None:
        return None
    members, frequency, phase, p_value = best
    first = (phase / frequency) % (1 / frequency)
    members = members[np.argsort(along[members], kind="stable")]
    at, _ = _pieces_together(y[None, members], members.size / _LEAST_SEEN)
    turn = (at[0] - first) * frequency
    near = np.abs(turn - np.rint(turn)) <= _REACH * jitter
    turns, seen = 1 + math.floor((1 - first) * frequency), np.unique(np.rint(turn[near])).size
    return Recurrence(
        p_value,
        p_value <= level and seen >= _wanted(turns),
        float(1 / frequency * length_mm),
        float(first * length_mm),
        tuple(members[near].tolist()),
        turns,
        seen,
    )


def _best(
    places: list[tuple[np.ndarray, np.ndarray]],
    pitch: float | None,
    least_turns: int,
    jitter: float,
    surrogates: int,
    rng: np.random.Generator,
) -> tuple[np.ndarray, float, float, float] | None:
    """The best lattice of all places: members, frequency in turns on the strip, phase in turns, p-value.

    Args:
      places: indices of the defects of one place, and their positions in [0, 1] along the strip.
      pitch: as a share of the strip.
    """
    fits, chance = [], np.full(surrogates, -np.inf)
    for members, y in places:
        limits = (float(least_turns), min(members.size / _LEAST_SEEN, np.inf if pitch is None else 0.4 / pitch))
        if limits[1] <= limits[0]:
            continue
        fits.append((members, *(v[0] for v in _fit(y[None], limits, jitter))))
        # A place with very many defects has a long spectrum, so that only some strips fit into memory.
        at_once = max(1, int(_AT_ONCE / limits[1]))
        drawn = [_redrawn(y, pitch, min(at_once, surrogates - i), rng) for i in range(0, surrogates, at_once)]
        chance = np.maximum(chance, np.concatenate([_fit(rows, limits, jitter)[0] for rows in drawn]))
    if not fits:
        return None
    members, value, frequency, phase = max(fits, key=lambda fit: fit[1])
    return members, frequency, phase, float(1 + np.count_nonzero(chance >= value)) / (surrogates + 1)


def _wanted(turns: int) -> float:
    """Turns that must be hit."""
    return max(_LEAST_MEMBERS, _LEAST_SEEN * turns)


def _places(across: np.ndarray, look: np.ndarray, tolerance: float, look_tolerance: float) -> list[np.ndarray]:
    """Index sets of defects alike in place and look, the largest first. The centre of a set is in no earlier set.

    Positions along the strip play no part, so that surrogates have the same sets.
    """
    near = np.abs(across[:, None] - across[None, :]) <= tolerance
    near &= (np.abs(look[:, None] - look[None, :]) <= look_tolerance).all(-1)
    open_, sets = np.ones(across.size, bool), []
    while open_.any():
        size = np.where(open_, near.sum(1), 0)
        centre = int(np.argmax(size))
        if size[centre] < _LEAST_MEMBERS:
            break
        sets.append(np.flatnonzero(near[centre]))
        open_ &= ~near[centre]
    return sets


def _redrawn(y: np.ndarray, pitch: float | None, count: int, rng: np.random.Generator) -> np.ndarray:
    """Surrogates `[count, n]` of positions `[n]` in [0, 1]: uniform, or moved by whole pitches."""
    u = rng.random((count, y.size))
    if pitch is None:
        return u
    phase = y % pitch
    return phase + pitch * np.floor(u * (np.floor((1 - phase) / pitch) + 1))


def _fit(y: np.ndarray, limits: tuple[float, float], jitter: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The best lattice of each row.

    Args:
      y: positions `[b, n]` in [0, 1], in any order.
      limits: least and highest frequency, in turns on the strip.

    Returns:
      `[b]` each: log-likelihood ratio against uniform positions of the best lattice; and of the lattice that explains the
      misses too, its frequency in turns on the strip and the phase of its first turn, in turns.
    """
    y, alone = _pieces_together(np.sort(y, 1), y.shape[1] / _LEAST_SEEN)
    frequency, phase = _proposals(y, alone, limits)  # [b, k]
    at, counts = y[:, None, :], alone[:, None, :]
    for width in _WIDTHS:
        sigma = width * jitter
        turn = at * frequency[..., None] - phase[..., None]
        off = turn - np.rint(turn)
        weight = counts * _responsibility(off, sigma)
        total = weight.sum(-1) + 1e-9
        mean_y, mean_off = (weight * at).sum(-1) / total, (weight * off).sum(-1) / total
        centred = at - mean_y[..., None]
        slope = (weight * centred * off).sum(-1) / ((weight * centred**2).sum(-1) + 1e-6)
        # A larger slope would turn the far end by more than the width, to another lattice.
        slope = np.clip(slope, -2 * sigma, 2 * sigma)
        frequency, phase = frequency - slope, phase + mean_off - slope * mean_y
    turn = at * frequency[..., None] - phase[..., None]
    number = np.rint(turn)
    off = turn - number
    density = np.exp(-0.5 * (off / jitter) ** 2) / (jitter * math.sqrt(2 * math.pi))
    near = np.abs(off) <= _REACH * jitter
    # Defects that hit one turn are neighbours; only the first of them is evidence.
    again = np.zeros_like(near)
    again[..., 1:] = near[..., 1:] & near[..., :-1] & (number[..., 1:] == number[..., :-1])
    counted = counts & ~again
    ratio = (counted * np.log1p(_SHARE * (density - 1))).sum(-1)
    seen = (counted & near).sum(-1)
    # A soft bound, so that strips without any lattice still differ and their p-values are uniform.
    lacking = np.maximum(np.maximum(_LEAST_SEEN * frequency, _LEAST_MEMBERS) - seen, 0)
    outside = np.maximum(np.maximum(limits[0] - frequency, frequency - limits[1]) - 0.5, 0)
    evidence = ratio - _LACKING * (lacking + outside)
    # The evidence tells whether there is a period. To tell which one, missed turns count too: half the period misses half of them.
    best = (evidence + math.log(1 - _SEEN) * np.maximum(frequency - seen, 0)).argmax(-1)[:, None]
    return evidence.max(-1), *(np.take_along_axis(a, best, 1)[:, 0] for a in (frequency, phase))


def _pieces_together(y: np.ndarray, most: float) -> tuple[np.ndarray, np.ndarray]:
    """Moves the pieces of a defect to the place of its first piece.

    Args:
      y: positions `[b, n]`, ascending.
      most: turns on the strip at the shortest period.

    Returns:
      Positions `[b, n]`, and bool `[b, n]`: the first piece of each defect.
    """
    alone = np.ones(y.shape, bool)
    alone[:, 1:] = np.diff(y, axis=1) > _PIECES / most
    first = np.maximum.accumulate(np.where(alone, np.arange(y.shape[1]), 0), axis=1)
    return np.take_along_axis(y, first, 1), alone


def _responsibility(off: np.ndarray, sigma: float) -> np.ndarray:
    """The probability that the roll made each defect, which lies `off` turns from the nearest turn."""
    roll = _SHARE * np.exp(-0.5 * (off / sigma) ** 2) / (sigma * math.sqrt(2 * math.pi))
    return roll / (roll + 1 - _SHARE)


def _proposals(y: np.ndarray, counts: np.ndarray, limits: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
    """Frequencies and phases `[b, k]` at the highest peaks of the periodogram of the positions `[b, n]` in [0, 1] that count."""
    first, last = math.floor(limits[0] * _OVERSAMPLING), math.ceil(limits[1] * _OVERSAMPLING)
    frequencies = np.arange(first, last + 1) / _OVERSAMPLING
    bins = 1 << max(6, math.ceil(math.log2(4 * limits[1])))
    rows = np.arange(len(y))[:, None] * bins
    cells = np.minimum((y * bins).astype(np.int64), bins - 1)
    events = np.bincount((rows + cells)[counts], minlength=len(y) * bins).reshape(len(y), bins)
    spectrum = np.fft.rfft(events, bins * _OVERSAMPLING)[:, first : last + 1]
    power = np.abs(spectrum)
    inner = power.copy()
    inner[:, 1:][power[:, 1:] < power[:, :-1]] = 0
    inner[:, :-1][power[:, :-1] <= power[:, 1:]] = 0
    k = min(_PEAKS, inner.shape[1])
    chosen = np.argpartition(-inner, k - 1, axis=1)[:, :k]
    phase = -np.angle(np.take_along_axis(spectrum, chosen, 1)) / (2 * math.pi)
    # A cell's position is that of its left edge; its centre is half a cell further.
    return frequencies[chosen], phase + 0.5 * frequencies[chosen] / bins


def summary(found: Recurrence, unit: str = "mm") -> str:
    """One sentence for a person."""
    if not found.periodic:
        few = found.seen < _wanted(found.turns)
        why = f", the likeliest is hit in {found.seen} of {found.turns} turns only" if few else ""
        return f"No period along the strip (p = {found.p_value:.3g}{why})."
    return (
        f"A period of {found.period_mm:.1f} {unit} (a roll of {found.roll_diameter_mm:.1f} {unit} in diameter): "
        f"{len(found.members)} defects in {found.seen} of {found.turns} turns, p = {found.p_value:.3g}."
    )
