"""Kronecker-sparse patterns and chains of them: every shape, size, FLOP and byte formula of the project.

No tensors here: a :class:`Pattern` is four integers, a :class:`Chain` a tuple of patterns and the two logical sizes.
Sources: Gonon et al., arXiv:2405.15013 (patterns); arXiv:2411.04506 (chainability, exact products).
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, overload

from structlayers.errors import ChainError
from structlayers.sizes import check_sizes, is_integer, most_blocks, near_square, power_pairs, radix_pairs

if TYPE_CHECKING:
    import torch

    from structlayers.plans import Plan
    from structlayers.problem import Layout


@dataclass(frozen=True, order=True)
class Pattern:
    """Support ``I_a (x) 1_{b x c} (x) I_d`` of one Kronecker-sparse factor.

    The matrix has ``a*b*d`` rows and ``a*c*d`` columns and holds ``a*d`` independent dense ``b x c`` blocks,
    interleaved with stride ``d``:

        y[n, (i*b + j)*d + l] = sum_k w[i, l, j, k] * x[n, (i*c + k)*d + l]

    Raises :class:`ChainError` if one of the four is not an integer >= 1.
    """

    a: int
    b: int
    c: int
    d: int

    def __post_init__(self) -> None:
        for name, value in zip("abcd", self, strict=True):
            if not is_integer(value) or value < 1:
                raise ChainError(f"pattern entry {name} = {value!r}: expected an integer >= 1 in {tuple(self)}")

    def __iter__(self) -> Iterator[int]:
        yield from (self.a, self.b, self.c, self.d)

    def __str__(self) -> str:
        return f"I{self.a} (x) 1[{self.b}x{self.c}] (x) I{self.d}"

    @classmethod
    def of_entries(cls, entries: Sequence[int]) -> Pattern:
        """The pattern of four integers ``a, b, c, d``."""
        entries = tuple(entries)
        if len(entries) != 4:
            raise ChainError(f"pattern {entries}: expected four integers (a, b, c, d)")
        return cls(*entries)

    @classmethod
    def of_weight(cls, shape: Sequence[int]) -> Pattern:
        """The pattern of a weight stored as ``(a, d, b, c)``."""
        if len(shape) != 4:
            raise ChainError(f"weight of shape {tuple(shape)}: expected four dimensions (a, d, b, c)")
        a, d, b, c = (int(size) for size in shape)
        return _cached_pattern(a, b, c, d)

    @property
    def in_features(self) -> int:
        return self.a * self.c * self.d

    @property
    def out_features(self) -> int:
        return self.a * self.b * self.d

    @property
    def n_blocks(self) -> int:
        return self.a * self.d

    @property
    def nnz(self) -> int:
        return self.a * self.b * self.c * self.d

    @property
    def density(self) -> float:
        return 1.0 / self.n_blocks

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        """The one storage of a factor, ``(a, d, b, c)``."""
        return (self.a, self.d, self.b, self.c)

    @property
    def T(self) -> Pattern:
        """The pattern of the transposed matrix, ``(a, c, b, d)``."""
        return Pattern(self.a, self.c, self.b, self.d)

    def flops(self, n: int) -> int:
        """FLOPs of one product with a batch of ``n`` rows (a multiply-add is two)."""
        return 2 * n * self.nnz

    def bytes(self, n: int, itemsize: int) -> int:
        """Least traffic in bytes: input and weight read once, output written once, ``itemsize`` bytes an element."""
        return (n * (self.in_features + self.out_features) + self.nnz) * itemsize

    def split(self, a: int, d: int, rank: int) -> Link:
        """The chainable pair ``left @ right`` of this product with ``right.a = a``, ``left.d = d`` and a link rank."""
        left = Pattern(self.a, self.b * self.d // d, a // self.a * rank, d)
        return Link(left, Pattern(a, d // self.d * rank, self.a * self.c // a, self.d))

    def link(self, right: Pattern) -> Link | None:
        """How ``self @ right`` factors if the pair is chainable, else None."""
        if self.in_features != right.out_features or right.a % self.a or self.d % right.d:
            return None
        if (self.a * self.c) % right.a or (right.b * right.d) % self.d:
            return None
        return Link(self, right)


@lru_cache(maxsize=4096)
def _cached_pattern(a: int, b: int, c: int, d: int) -> Pattern:
    """Made once for every shape: the operators ask for it several times a call."""
    return Pattern(a, b, c, d)


@dataclass(frozen=True)
class Link:
    """A chainable pair ``left @ right``: ``left.a | right.a``, ``right.d | left.d``, integer link rank.

    The pair is ``left.a * right.d`` independent products of a ``(1, b, alpha*rank, delta)`` and an
    ``(alpha, delta*rank, c, 1)`` factor.
    """

    left: Pattern
    right: Pattern

    @property
    def alpha(self) -> int:
        return self.right.a // self.left.a

    @property
    def delta(self) -> int:
        return self.left.d // self.right.d

    @property
    def rank(self) -> int:
        """Rank of every block that one left and one right block share."""
        return self.left.a * self.left.c // self.right.a

    @property
    def is_redundant(self) -> bool:
        """Whether the product set is no smaller than that of the merged pattern."""
        return self.rank >= min(self.left.b, self.right.c)

    @property
    def product(self) -> Pattern:
        """The pattern of the product, itself Kronecker-sparse."""
        return Pattern(self.left.a, self.left.b * self.delta, self.alpha * self.right.c, self.right.d)


class Chain(Sequence[Pattern]):
    """A product ``W = K_1 ... K_L`` of Kronecker-sparse factors, in written order: the last touches the input first.

    ``in_features`` and ``out_features`` are the logical sizes: ``W`` is the leading ``(out, in)`` part of the product,
    so a chain may be padded beyond the layer that it stands for; the padding counts in parameters and FLOPs.
    Raises :class:`ChainError` if neighbours do not compose or a logical size exceeds the padded one.
    """

    def __init__(
        self,
        patterns: Iterable[Pattern | Sequence[int]],
        in_features: int | None = None,
        out_features: int | None = None,
    ) -> None:
        self.patterns = tuple(p if isinstance(p, Pattern) else Pattern.of_entries(p) for p in patterns)
        if not self.patterns:
            raise ChainError("chain of 0 patterns: expected at least one")
        for q, (left, right) in enumerate(zip(self.patterns, self.patterns[1:], strict=False), start=1):
            if left.in_features != right.out_features:
                raise ChainError(
                    f"factors {q} and {q + 1} do not compose: {tuple(left)} reads {left.in_features} features "
                    f"but {tuple(right)} writes {right.out_features}"
                )
        self.in_features = self.padded_in_features if in_features is None else in_features
        self.out_features = self.padded_out_features if out_features is None else out_features
        for name, logical, padded in (
            ("in_features", self.in_features, self.padded_in_features),
            ("out_features", self.out_features, self.padded_out_features),
        ):
            if not is_integer(logical) or not 1 <= logical <= padded:
                raise ChainError(
                    f"{name} = {logical!r}: expected 1 to {padded}, the size of the product {self._product()}"
                )

    # ---- a sequence of patterns, a value

    @overload
    def __getitem__(self, index: int) -> Pattern: ...
    @overload
    def __getitem__(self, index: slice) -> Chain: ...
    def __getitem__(self, index: int | slice) -> Pattern | Chain:
        if isinstance(index, slice):
            return Chain(self.patterns[index])
        return self.patterns[index]

    def __len__(self) -> int:
        return len(self.patterns)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Chain) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    @property
    def _key(self) -> tuple[object, ...]:
        return (self.patterns, self.in_features, self.out_features)

    def _product(self) -> str:
        return "".join(f"({p.a},{p.b},{p.c},{p.d})" for p in self.patterns)

    @property
    def spec(self) -> str:
        """The text that :meth:`parse` reads: ``(1,33,25,4)(4,25,25,1)``, then ``[:130,:100]`` where W is padded."""
        return self._product() + (f"[:{self.out_features},:{self.in_features}]" if self.is_padded else "")

    def __repr__(self) -> str:
        return f"Chain.parse({self.spec!r})"

    def __str__(self) -> str:
        crop = f"[:{self.out_features}, :{self.in_features}]" if self.is_padded else ""
        product = " @ ".join(f"({p})" for p in self.patterns)
        return f"({product}){crop}" if crop else product

    @classmethod
    def parse(cls, spec: str) -> Chain:
        """Read ``"(1,192,192,4)(4,192,192,1)"``, optionally with a crop ``[:out,:in]`` behind it."""
        text = re.sub(r"\s", "", spec) if isinstance(spec, str) else ""
        match = re.fullmatch(r"((?:\(\d+,\d+,\d+,\d+\),?)+)(?:\[:(\d+),:(\d+)\])?", text)
        if match is None:
            raise ChainError(f"chain {spec!r}: expected (a,b,c,d)(a,b,c,d)... with integers, optionally [:out,:in]")
        patterns = [Pattern(*map(int, p)) for p in re.findall(r"\((\d+),(\d+),(\d+),(\d+)\)", match[1])]
        return cls(
            patterns,
            in_features=int(match[3]) if match[3] else None,
            out_features=int(match[2]) if match[2] else None,
        )

    # ---- sizes and costs

    @property
    def padded_in_features(self) -> int:
        return self.patterns[-1].in_features

    @property
    def padded_out_features(self) -> int:
        return self.patterns[0].out_features

    @property
    def is_padded(self) -> bool:
        return (self.in_features, self.out_features) != (self.padded_in_features, self.padded_out_features)

    @property
    def weight_shapes(self) -> tuple[tuple[int, int, int, int], ...]:
        return tuple(p.weight_shape for p in self.patterns)

    @property
    def n_params(self) -> int:
        """Parameters of all factors, padding included."""
        return sum(p.nnz for p in self.patterns)

    @property
    def dense_params(self) -> int:
        """Parameters of the dense layer of the same logical size."""
        return self.in_features * self.out_features

    @property
    def kept(self) -> float:
        """Parameters over those of the dense layer."""
        return self.n_params / self.dense_params

    @property
    def is_dense_in_disguise(self) -> bool:
        """Whether the chain has as many parameters as the dense layer, so that nothing is gained."""
        return self.n_params >= self.dense_params

    def flops(self, n: int) -> int:
        """FLOPs of the factors one after the other, for a batch of ``n`` rows."""
        return sum(p.flops(n) for p in self.patterns)

    def bytes(self, n: int, itemsize: int, fused: bool = False) -> int:
        """Traffic in bytes: every intermediate written and read once, or none of them if ``fused``."""
        if not fused:
            return sum(p.bytes(n, itemsize) for p in self.patterns)
        return (n * (self.in_features + self.out_features) + self.n_params) * itemsize

    # ---- algebra

    @property
    def T(self) -> Chain:
        """The chain of the transposed matrix."""
        return Chain([p.T for p in reversed(self.patterns)], self.out_features, self.in_features)

    @cached_property
    def links(self) -> tuple[Link | None, ...]:
        """One entry per pair of neighbours; None where the pair is not chainable."""
        return tuple(p.link(q) for p, q in zip(self.patterns, self.patterns[1:], strict=False))

    @property
    def is_chainable(self) -> bool:
        """Whether every pair of neighbours is chainable: any sub-chain then multiplies to one exact factor."""
        return all(link is not None for link in self.links)

    @property
    def link_ranks(self) -> tuple[int | None, ...]:
        return tuple(None if link is None else link.rank for link in self.links)

    @property
    def is_redundant(self) -> bool:
        """Whether some pair of neighbours could be merged without losing expressivity or gaining parameters."""
        return any(link is not None and link.is_redundant for link in self.links)

    def merge(self, start: int = 0, stop: int | None = None) -> Chain:
        """The chain with factors ``start`` to ``stop - 1`` (all, by default) multiplied into one exact factor.

        Raises :class:`ChainError` where two of them are not chainable.
        """
        indices = range(len(self))[start:stop]
        if not len(indices):
            raise ChainError(f"merge({start}, {stop}) of a chain of {len(self)} factors selects none")
        merged = self.patterns[indices[0]]
        for q in indices[1:]:
            link = merged.link(self.patterns[q])
            if link is None:
                raise ChainError(
                    f"{tuple(merged)} and {tuple(self.patterns[q])} are not chainable and cannot be merged"
                )
            merged = link.product
        patterns = (*self.patterns[: indices[0]], merged, *self.patterns[indices[-1] + 1 :])
        return Chain(patterns, self.in_features, self.out_features)

    # ---- execution

    def plan(
        self,
        n: int,
        dtype: torch.dtype,
        device: torch.device | str,
        layout: str | Layout = "batch_first",
        mode: str = "inference",
        backend: str = "auto",
    ) -> Plan:
        """How a product with a batch of ``n`` rows is executed: :func:`structlayers.plans.plan`."""
        # Sizes and formulas need no tensors; only this looks up.
        from structlayers import plans

        return plans.plan(self, n, dtype, device, layout, mode, backend)

    # ---- named structures

    @classmethod
    def dense(cls, in_features: int, out_features: int) -> Chain:
        """One dense block."""
        return cls([Pattern(1, out_features, in_features, 1)])

    @classmethod
    def low_rank(cls, in_features: int, out_features: int, rank: int) -> Chain:
        """``(1, m, r, 1)(1, r, n, 1)``."""
        return cls([Pattern(1, out_features, rank, 1), Pattern(1, rank, in_features, 1)])

    @classmethod
    def block_diagonal(cls, in_features: int, out_features: int, blocks: int = 4) -> Chain:
        """``(N, m/N, n/N, 1)``, sizes rounded up to the block count."""
        check_sizes(in_features=in_features, out_features=out_features, blocks=blocks)
        pattern = Pattern(blocks, -(-out_features // blocks), -(-in_features // blocks), 1)
        return cls([pattern], in_features, out_features)

    @classmethod
    def monarch(cls, in_features: int, out_features: int, blocks: int = 4, rank: int | None = None) -> Chain:
        """``(1, m/k, q, k)(k, q, n/k, 1)`` with ``k`` blocks: block-diagonal, transpose, block-diagonal.

        The middle width per block ``q`` is the smaller of ``m/k`` and ``n/k``, or ``rank * blocks`` where ``rank`` (the
        link rank) is given. Features that ``k`` does not divide are padded; a ``q`` that it does not divide is rounded
        up to the next multiple, with a warning, so that the chain stays chainable.
        Raises :class:`ChainError` if ``q < k``: then only the fraction ``q/k`` of W can be non-zero.
        Source: Dao et al., arXiv:2204.00595.
        """
        check_sizes(in_features=in_features, out_features=out_features, blocks=blocks)
        p, s = -(-in_features // blocks), -(-out_features // blocks)
        if rank is None:
            q = min(p, s)
            if q < blocks:
                raise ChainError(
                    f"monarch {in_features} -> {out_features} with blocks={blocks}: "
                    f"the middle has {q} features per block, "
                    f"so only {q}/{blocks} = {q / blocks:.1%} of W could be non-zero; "
                    f"expected blocks <= {most_blocks(in_features, out_features)}, or rank= to widen the middle"
                )
            if q % blocks:
                rounded = -(-q // blocks) * blocks
                warnings.warn(
                    f"monarch {in_features} -> {out_features} with blocks={blocks}: middle width per block rounded up "
                    f"from {q} to {rounded}, a multiple of the block count",
                    stacklevel=2,
                )
                q = rounded
        else:
            check_sizes(rank=rank)
            q = rank * blocks
        return cls([Pattern(1, s, q, blocks), Pattern(blocks, q, p, 1)], in_features, out_features)

    @classmethod
    def btt(cls, in_features: int, out_features: int, rank: int = 1) -> Chain:
        """Block Tensor-Train: ``(1, n1, m1 r, n0)(m1, r n0, m0, 1)`` with ``n = m0 m1``, ``m = n0 n1`` near square.

        The output is in this chain's own order, without the permutation of the original code.
        Source: Qiu et al., arXiv:2406.06248.
        """
        check_sizes(in_features=in_features, out_features=out_features, rank=rank)
        m0, m1 = near_square(in_features)
        n1, n0 = near_square(out_features)
        patterns = [Pattern(1, n1, m1 * rank, n0), Pattern(m1, rank * n0, m0, 1)]
        return cls(patterns, in_features, out_features)

    @classmethod
    def butterfly(
        cls,
        in_features: int,
        radix: int | Sequence[int] | Sequence[tuple[int, int]] = 2,
        out_features: int | None = None,
    ) -> Chain:
        """A butterfly chain: rank-1 links, one small block size per factor.

        ``radix``: one integer (sizes that are no power of it are padded to the next; where ``out_features`` is another
        power, the surplus widens the leftmost factors), or one integer per factor, or one pair ``(b, c)`` per factor
        for a rectangular chain with ``prod(b)`` rows and ``prod(c)`` columns.
        Factor ``l`` has ``a = c_1 ... c_{l-1}`` and ``d = b_{l+1} ... b_L``.
        """
        out_features = in_features if out_features is None else out_features
        check_sizes(in_features=in_features, out_features=out_features)
        pairs = power_pairs(in_features, out_features, radix) if isinstance(radix, int) else radix_pairs(radix)
        rows, columns = math.prod(b for b, _ in pairs), math.prod(c for _, c in pairs)
        if rows < out_features or columns < in_features:
            raise ChainError(
                f"radix = {radix!r} multiplies to {columns} inputs and {rows} outputs: "
                f"expected at least {in_features} and {out_features}"
            )
        patterns = []
        a, d = 1, rows
        for b, c in pairs:
            d //= b
            patterns.append(Pattern(a, b, c, d))
            a *= c
        return cls(patterns, in_features, out_features)
