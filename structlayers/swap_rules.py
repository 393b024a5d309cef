"""Which layers get which chain: the rules that :func:`structlayers.surgery.swap_linears` reads."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

from structlayers.errors import ChainError, ConfigError
from structlayers.patterns import Chain
from structlayers.values import MAPPING, Kind, check, nullable, number, patterns

STRUCTURES: dict[str, Callable[..., Chain]] = {
    "monarch": Chain.monarch,
    "butterfly": Chain.butterfly,
    "btt": Chain.btt,
    "low_rank": Chain.low_rank,
    "block_diagonal": Chain.block_diagonal,
    "dense": Chain.dense,
}

_KINDS = {
    "structure": Kind("a name or a chain's text", lambda value: isinstance(value, str)),
    "options": nullable(MAPPING),
    "max_kept": number("a fraction of the dense parameters above 0", lambda value: value > 0),
    "budget": nullable(number("a fraction of the dense parameters, above 0, at most 1", lambda value: 0 < value <= 1)),
}


@dataclass(frozen=True)
class SwapRule:
    """Which layers get which chain.

    ``structure``: a name in :data:`STRUCTURES`, with the constructor's own ``options`` (``{"blocks": 4}``), or a chain
    spec ``"(1,192,192,4)(4,192,192,1)"``. ``include`` and ``exclude``: fnmatch patterns on the dotted module name
    (``"*.mlp.*"``); ``*`` also matches dots. A chain with ``kept >= max_kept`` is not installed, nor one that is dense
    in disguise; ``structure="dense"`` asks for a dense chain and is exempt from both. ``budget``: the option ``rank``
    is the largest whose chain keeps at most this fraction of the parameters, padding included.
    Raises :class:`ConfigError` for an unknown structure or option, naming what exists.
    """

    structure: str = "monarch"
    options: Mapping[str, Any] = field(default_factory=dict)
    include: Sequence[str] = ("*",)
    exclude: Sequence[str] = ()
    max_kept: float = 1.0
    budget: float | None = None

    def __post_init__(self) -> None:
        check(vars(self), _KINDS)
        for name in ("include", "exclude"):
            object.__setattr__(self, name, patterns(name, getattr(self, name)))
        object.__setattr__(self, "options", dict(self.options or {}))
        if self._is_spec:
            if self.options:
                raise ConfigError(f"options {dict(self.options)} with the chain {self.structure!r}: expected none")
            if self.budget is not None:
                raise ConfigError(f"budget = {self.budget!r} with the chain {self.structure!r}, whose ranks are given")
            Chain.parse(self.structure)
        else:
            self._check_options()

    def _check_options(self) -> None:
        if self.structure not in STRUCTURES:
            known = ", ".join(STRUCTURES)
            raise ConfigError(
                f"structure {self.structure!r}: expected one of {known}, or a chain (a,b,c,d)(a,b,c,d)..."
            )
        parameters = inspect.signature(STRUCTURES[self.structure]).parameters
        options = [name for name in parameters if name not in ("in_features", "out_features")]
        if unknown := set(self.options) - set(options):
            raise ConfigError(
                f"structure {self.structure!r} has no option {', '.join(sorted(unknown))}: "
                f"expected {', '.join(options) or 'no options'}"
            )
        if self.budget is not None and ("rank" not in options or self.options.get("rank") is not None):
            has = f"options {dict(self.options)}" if "rank" in options else "no option rank"
            raise ConfigError(
                f"budget = {self.budget!r} with structure {self.structure!r} of {has}: expected a free rank"
            )
        needed = {name for name in options if parameters[name].default is inspect.Parameter.empty}
        needed -= {"rank"} if self.budget is not None else set()
        if missing := sorted(needed - set(self.options)):
            raise ConfigError(f"structure {self.structure!r} needs the option {', '.join(missing)}")

    @property
    def _is_spec(self) -> bool:
        return self.structure.lstrip().startswith("(")

    def chain(self, in_features: int, out_features: int) -> Chain:
        """The chain for a layer of this shape; raises :class:`ChainError` where there is none."""
        if self._is_spec:
            chain = Chain.parse(self.structure)
            check_fit(chain, in_features, out_features)
        else:
            chain = self._construct(in_features, out_features)
        if self.structure != "dense":
            check_gain(chain, self.max_kept)
        return chain

    def _construct(self, in_features: int, out_features: int) -> Chain:
        make = STRUCTURES[self.structure]
        sizes = {"in_features": in_features, "out_features": out_features, **self.options}
        if self.budget is None:
            return make(**sizes)
        # The parameters of these structures are proportional to the rank.
        least = make(**{**sizes, "rank": 1})
        rank = int(self.budget / least.kept * (1 + 1e-12))
        if rank < 1:
            raise ChainError(
                f"{least.spec}, of rank 1, keeps {least.kept:.1%}: more than the budget of {self.budget:.1%}"
            )
        return make(**{**sizes, "rank": rank})

    def matches(self, name: str) -> bool:
        return first_match(name, self.include) is not None and first_match(name, self.exclude) is None


RuleLike: TypeAlias = SwapRule | Mapping[str, Any] | str
Chooser: TypeAlias = Callable[[str, int, int], Chain | None]
Rules: TypeAlias = RuleLike | Sequence[RuleLike] | Chooser


def chooser(rule: Rules, names: Sequence[str]) -> Callable[[str, int, int], Chain]:
    """The function ``(name, in_features, out_features) -> Chain`` that ``rule`` stands for, on layers so named.

    It raises :class:`ChainError`, with the reason, where a layer gets no chain.
    Raises :class:`ConfigError` if a rule is malformed or matches none of ``names``.
    """
    if not names:
        raise ConfigError("the model has no linear layer: expected at least one to swap")
    return _by_callable(rule) if callable(rule) else _by_rules(rule, names)


def check_fit(chain: Chain, in_features: int, out_features: int) -> None:
    """Raise :class:`ChainError` if the chain's logical sizes are others."""
    if (chain.in_features, chain.out_features) != (in_features, out_features):
        raise ChainError(
            f"{chain.spec} maps {chain.in_features} -> {chain.out_features} features: "
            f"expected {in_features} -> {out_features}"
        )


def check_gain(chain: Chain, max_kept: float) -> None:
    """Raise :class:`ChainError` if the chain keeps too many parameters or is dense in disguise."""
    if chain.is_dense_in_disguise or chain.kept >= max_kept:
        limit = min(max_kept, 1.0)
        raise ChainError(f"{chain.spec} keeps {chain.kept:.1%} of the parameters: expected less than {limit:.1%}")


def first_match(name: str, patterns: Iterable[str]) -> str | None:
    """The first fnmatch pattern that ``name`` matches, if any."""
    return next((pattern for pattern in patterns if fnmatchcase(name, pattern)), None)


def _as_rule(rule: object) -> SwapRule:
    if isinstance(rule, SwapRule):
        return rule
    if isinstance(rule, str):
        return SwapRule(rule)
    if not isinstance(rule, Mapping):
        raise ConfigError(f"rule {rule!r}: expected a SwapRule, a mapping or the name of a structure")
    known = [f.name for f in fields(SwapRule)]
    if not rule:
        # "No swap" in a configuration must not become the default structure.
        raise ConfigError(f"an empty rule: expected at least one of {', '.join(known)}")
    if unknown := set(rule) - set(known):
        raise ConfigError(f"rule with {', '.join(map(repr, sorted(unknown)))}: expected only {', '.join(known)}")
    return SwapRule(**rule)


def _by_rules(rule: RuleLike | Sequence[RuleLike], names: Sequence[str]) -> Callable[[str, int, int], Chain]:
    rules = list(map(_as_rule, rule)) if isinstance(rule, list | tuple) else [_as_rule(rule)]
    if not rules:
        raise ConfigError("an empty list of rules: expected at least one")
    for r in rules:
        if not any(map(r.matches, names)):
            without = f" without {', '.join(map(repr, r.exclude))}" if r.exclude else ""
            examples = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
            raise ConfigError(
                f"rule {', '.join(map(repr, r.include))}{without} matches no linear layer: expected some of {examples}"
            )

    def choose(name: str, in_features: int, out_features: int) -> Chain:
        for r in rules:
            if r.matches(name):
                return r.chain(in_features, out_features)
        excluded = next((p for r in rules if (p := first_match(name, r.exclude)) is not None), None)
        raise ChainError(f"excluded by {excluded!r}" if excluded else "no rule includes it")

    return choose


def _by_callable(rule: Chooser) -> Callable[[str, int, int], Chain]:
    def choose(name: str, in_features: int, out_features: int) -> Chain:
        chain = rule(name, in_features, out_features)
        if chain is None:
            raise ChainError("the rule chose no chain")
        if not isinstance(chain, Chain):
            raise ConfigError(f"the rule returned {chain!r} for {name}: expected a Chain or None")
        check_fit(chain, in_features, out_features)
        check_gain(chain, 1.0)
        return chain

    return choose
