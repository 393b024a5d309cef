"""Compare two result files, case by case: ``python -m structlayers.bench compare BEFORE AFTER [options]``.

A case is faster or slower where the medians differ by more than the threshold and the ranges from p20 to p80 do not
overlap; else it is the same. On two different machines ``--relative`` compares the times as multiples of dense.
"""

import argparse
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from structlayers.bench.case_rows import aligned
from structlayers.bench.measurements import Measurement, ResultFiles, read_files
from structlayers.errors import DataError

FASTER, SLOWER, SAME = "faster", "slower", "same"
GONE, NEW, BROKE, MENDED = "only before", "only after", "no longer timed", "timed now"
_ORDER = (SLOWER, BROKE, FASTER, MENDED, GONE, NEW, SAME)
_THRESHOLD = 0.03


@dataclass(frozen=True)
class Verdict:
    """One contender of one case in both files; ``ratio`` is the time before over the time after."""

    measurement: Measurement
    verdict: str
    before: float | None = None
    after: float | None = None
    reason: str = ""

    @property
    def ratio(self) -> float | None:
        return None if self.before is None or self.after is None else self.before / self.after


def compare_files(
    before: ResultFiles, after: ResultFiles, threshold: float = _THRESHOLD, relative: bool = False
) -> list[Verdict]:
    """A verdict for everything that either of them has, what is slower first."""
    old, new = _by_key(before), _by_key(after)
    verdicts = []
    for key in dict.fromkeys((*old, *new)):
        if key not in new or key not in old:
            known = old.get(key) or new[key]
            verdicts.append(Verdict(known, GONE if key in old else NEW))
            continue
        first, second = old[key], new[key]
        if first.p50_ms is None or second.p50_ms is None:
            if first.p50_ms is not None or second.p50_ms is not None:
                verdicts.append(Verdict(second, BROKE if second.p50_ms is None else MENDED, reason=second.reason))
            continue
        units = (_dense_ms(first, old), _dense_ms(second, new)) if relative else (1.0, 1.0)
        if units[0] is None or units[1] is None:
            continue
        verdicts.append(_verdict(first, second, units[0], units[1], threshold))
    return sorted(verdicts, key=lambda v: (_ORDER.index(v.verdict), v.ratio or 1.0))


def _by_key(found: ResultFiles) -> dict[tuple[object, ...], Measurement]:
    return {entry.key: entry for entry in found.measurements()}


def _dense_ms(entry: Measurement, among: dict[tuple[object, ...], Measurement]) -> float | None:
    dense = among.get((*entry.case_key, "dense"))
    return None if dense is None else dense.p50_ms


def _verdict(before: Measurement, after: Measurement, unit_0: float, unit_1: float, threshold: float) -> Verdict:
    assert before.p50_ms is not None and after.p50_ms is not None
    old, new = before.p50_ms / unit_0, after.p50_ms / unit_1
    # Rows without a spread have their median alone.
    low_0, high_0 = (before.p20_ms or before.p50_ms) / unit_0, (before.p80_ms or before.p50_ms) / unit_0
    low_1, high_1 = (after.p20_ms or after.p50_ms) / unit_1, (after.p80_ms or after.p50_ms) / unit_1
    if old > new * (1 + threshold) and high_1 < low_0:
        found = FASTER
    elif new > old * (1 + threshold) and high_0 < low_1:
        found = SLOWER
    else:
        found = SAME
    return Verdict(after, found, old, new)


def summary(verdicts: Sequence[Verdict]) -> str:
    """How many of each verdict by kind and contender, and the geometric mean of the ratios."""
    groups: dict[tuple[str, str], list[Verdict]] = {}
    for verdict in verdicts:
        groups.setdefault((verdict.measurement.kind, verdict.measurement.contender), []).append(verdict)
    lines = [["kind", "contender", *_ORDER, "before / after"]]
    for (kind, contender), group in sorted(groups.items()):
        counts = [str(sum(v.verdict == name for v in group)) for name in _ORDER]
        ratios = [math.log(v.ratio) for v in group if v.ratio]
        mean = f"{math.exp(statistics.fmean(ratios)):.3f}" if ratios else ""
        lines.append([kind, contender, *counts, mean])
    return "\n".join(aligned(lines, left={0, 1}))


def table(verdicts: Sequence[Verdict], unit: str) -> str:
    """One line for every verdict."""
    lines = [
        ["verdict", "kind", "case", "contender", "N", "dtype", "layout", f"before {unit}", f"after {unit}", "ratio"]
    ]
    for verdict in verdicts:
        entry = verdict.measurement
        cells = [verdict.verdict, entry.kind, entry.case, entry.contender, str(entry.n), entry.dtype, entry.layout]
        cells += ["" if value is None else f"{value:.4g}" for value in (verdict.before, verdict.after)]
        lines.append([*cells, "" if verdict.ratio is None else f"{verdict.ratio:.3f}"])
    return "\n".join(aligned(lines, left={0, 1, 2, 3, 5, 6}))


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(
        prog="python -m structlayers.bench compare", description=(__doc__ or "").partition("\n\n")[2]
    )
    add = options.add_argument
    add("before", type=Path)
    add("after", type=Path)
    add("--threshold", type=float, default=_THRESHOLD, help="least share that counts (default %(default)s)")
    add("--relative", action="store_true", help="compare times as multiples of dense, for two machines")
    add("--all", action="store_true", help="list what is the same too")
    add("--fail-on-slower", action="store_true", help="exit code 1 if anything is slower or no longer timed")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    try:
        before, after = read_files([options.before]), read_files([options.after])
    except DataError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    verdicts = compare_files(before, after, options.threshold, options.relative)
    print(f"before: {'; '.join(before.machines()) or options.before}")
    print(f"after:  {'; '.join(after.machines()) or options.after}")
    for message in (*before.broken, *after.broken):
        print(f"left out: {message}")
    shown = [verdict for verdict in verdicts if options.all or verdict.verdict != SAME]
    if shown:
        print(table(shown, "x dense" if options.relative else "ms"))
    print(summary(verdicts))
    worse = [verdict for verdict in verdicts if verdict.verdict in (SLOWER, BROKE)]
    if options.fail_on_slower and worse:
        sys.exit(1)
