"""The chains that are timed: named sets of cases, each with the speed that it is to reach."""

import random
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from structlayers.bench.grid import PAPER_BATCH
from structlayers.bench.timing import check_batches
from structlayers.errors import ChainError, ConfigError
from structlayers.patterns import Chain

# What is asked at N = 4,096: this share of the ratio at N = 25,088.
_SHARE_AT_4096 = 0.8
WIDTHS = (256, 384, 512, 768, 1024, 1280, 2048, 4096, 5120, 8192)
BLOCKS = (2, 4, 8, 16, 32, 64)
FROZEN_BATCHES = (1, 64, 1024, PAPER_BATCH)
SWEEP_BATCHES = (1, 16, 64, 256, 1024, 4096, PAPER_BATCH)


@dataclass(frozen=True)
class ChainCase:
    """One chain at one batch, dtype and layout. ``target``: time of dense over that of the chain; ``like``: a case."""

    chain: Chain
    label: str
    n: int
    dtype: str
    layout: str = "batch_first"
    target: float | None = None
    like: str = ""

    @property
    def name(self) -> str:
        return f"{self.chain.in_features} -> {self.chain.out_features}, {self.label}"


def monarch_case(d_in: int, d_out: int, blocks: int, n: int, dtype: str, target: float | None = None) -> ChainCase:
    """A two-factor Monarch chain; raises ``ChainError`` where it would leave parts of the weight zero."""
    with warnings.catch_warnings():
        # A middle that is rounded up is still a chain to be timed.
        warnings.simplefilter("ignore")
        return ChainCase(Chain.monarch(d_in, d_out, blocks), f"{blocks} blocks", n, dtype, target=target)


# d_in, d_out, blocks, least ratio at N = 25,088.
_FORWARD_BFLOAT16 = (
    (384, 1536, 4, 1.1),
    (1536, 384, 4, 1.1),
    (768, 768, 4, 1.1),
    (1024, 1024, 32, 1.6),
    (1024, 4096, 4, 2.0),
    (4096, 1024, 16, 2.2),
    (4096, 4096, 64, 5.0),
    (8192, 8192, 64, 9.0),
    (4096, 4096, 4, 1.25),
)
_FORWARD_FLOAT32 = ((1024, 1024, 32, 7.0), (1024, 4096, 4, 3.5), (4096, 1024, 16, 9.0), (4096, 4096, 64, 20.0))
# d_in, d_out, blocks, N, least ratio (None: shown).
_SMALL_BATCHES = (
    (8192, 8192, 64, 1, 12.0),
    (4096, 4096, 64, 1, 3.5),
    (768, 768, 4, 1, None),
    (8192, 8192, 64, 64, 7.0),
    (4096, 4096, 64, 64, 2.0),
    (768, 768, 4, 64, None),
)
_TRAINING = (
    (1024, 4096, 4, "bfloat16", 1.3),
    (4096, 1024, 16, "bfloat16", 1.6),
    (4096, 4096, 64, "bfloat16", 3.5),
    (8192, 8192, 64, "bfloat16", 6.5),
    (768, 768, 4, "bfloat16", 0.9),
    (384, 1536, 4, "bfloat16", 0.9),
    (1536, 384, 4, "bfloat16", 0.9),
    (1024, 4096, 4, "float32", 3.0),
)


def forward_table() -> list[ChainCase]:
    """The forward products of Monarch chains, butterflies and Block Tensor-Trains, large and small batches."""
    cases = []
    for n, share in ((PAPER_BATCH, 1.0), (4096, _SHARE_AT_4096)):
        cases += [monarch_case(i, o, k, n, "bfloat16", share * target) for i, o, k, target in _FORWARD_BFLOAT16]
        for width, blocks in ((1024, 32), (4096, 64)):
            # Its halves multiply to the factors of the Monarch chain of that many blocks.
            like = f"{width} -> {width}, {blocks} blocks"
            cases.append(ChainCase(Chain.butterfly(width), "radix-2 butterfly", n, "bfloat16", like=like))
        for rank, target in ((1, None), (2, None), (4, 2.5 * share), (8, None)):
            cases.append(ChainCase(Chain.btt(4096, 4096, rank), f"BTT rank {rank}", n, "bfloat16", target=target))
        cases += [monarch_case(i, o, k, n, "float32", share * target) for i, o, k, target in _FORWARD_FLOAT32]
    return cases + [monarch_case(d_in, d_out, k, n, "bfloat16", t) for d_in, d_out, k, n, t in _SMALL_BATCHES]


def frozen_grid() -> list[ChainCase]:
    """Every shape on which a frozen layer may not be slower than dense: widths, blocks and batches in all combinations.

    Without the chains that would leave parts of the weight zero; in an order that is always the same and follows no
    size, so that the first minutes of a sweep are a sample of it.
    """
    cases = []
    for n in FROZEN_BATCHES:
        for d_in in WIDTHS:
            for d_out in WIDTHS:
                for blocks in BLOCKS:
                    try:
                        cases.append(monarch_case(d_in, d_out, blocks, n, "bfloat16"))
                    except ChainError:
                        continue
    random.Random(0).shuffle(cases)
    return cases


def width_sweep() -> list[ChainCase]:
    """Square Monarch chains of 4 blocks, and of about as many as they have rows in a block, over width and batch."""
    shapes = [(256, 16), (512, 16), (1024, 32), (2048, 32), (4096, 64), (8192, 64)]
    shapes += [(width, 4) for width in (256, 512, 1024, 2048, 4096, 8192)]
    return [monarch_case(w, w, blocks, n, "bfloat16") for w, blocks in shapes for n in SWEEP_BATCHES]


def training_table() -> list[ChainCase]:
    """The chains whose forward and backward passes are timed."""
    return [monarch_case(i, o, k, PAPER_BATCH, dtype, target) for i, o, k, dtype, target in _TRAINING]


SUITES = {"table": forward_table, "frozen": frozen_grid, "sweep": width_sweep, "training": training_table}


def chain_cases(
    suite: str,
    chains: Sequence[str] = (),
    batches: Sequence[int] = (),
    dtypes: Sequence[str] = (),
    layouts: Sequence[str] = ("batch_first",),
) -> list[ChainCase]:
    """The cases of a suite, or of ``chains`` written out; batches and dtypes that are named stand in for its own.

    Raises ``ConfigError`` for an unknown suite or a batch below 1, ``ChainError`` for a text that is no chain.
    """
    check_batches(batches)
    if chains:
        found: Iterable[ChainCase] = [
            ChainCase(Chain.parse(text), Chain.parse(text).spec, PAPER_BATCH, "bfloat16") for text in chains
        ]
    elif suite in SUITES:
        found = SUITES[suite]()
    else:
        raise ConfigError(f"suite = {suite!r}: expected one of {', '.join(SUITES)}")
    found = list(dict.fromkeys(_changed(found, "n", batches)))
    found = list(dict.fromkeys(_changed(found, "dtype", dtypes)))
    return [case if case.layout == layout else replace(case, layout=layout) for layout in layouts for case in found]


def _changed(cases: Iterable[ChainCase], name: str, values: Sequence[object]) -> Iterable[ChainCase]:
    """Every case with every value; where a case had that value it keeps its target."""
    for case in cases:
        if not values:
            yield case
        for value in values:
            if getattr(case, name) == value:
                yield case
            else:
                yield replace(case, target=None, like="", **{name: value})  # type: ignore[arg-type]
