"""Which arms a run has: every optimization alone, peers if asked for, and at last the combination of what passed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch

from abtest.arm import WORKER
from abtest.command import arm_units as gate_units
from abtest.command import reference_units
from abtest.settings import GateConfig
from bench.peers import PEERS, Peer
from bench.records import Role
from kernels import registry
from kernels.contract import Exactness, Optimization
from loop.config import Config
from loop.errors import UserError

JOIN = "+"  # between optimizations that are one arm


@dataclass(frozen=True)
class ArmPlan:
    """One arm to gate and time. missing: why it cannot run here at all. untimed: why it is gated but not timed. own_stock:
    it is compared with stock of its own configuration, not with the run's. worker: what its process runs. versions: of a
    peer's packages, by name."""

    name: str
    role: Role
    optimizations: tuple[str, ...]
    config: Config
    claim: Exactness
    summary: str
    why_exact: str
    missing: str | None = None
    untimed: str | None = None
    own_stock: bool = False
    worker: tuple[str, ...] = WORKER
    versions: tuple[tuple[str, str], ...] = ()


def plan_arms(names: Iterable[str], config: Config, device: torch.device) -> list[ArmPlan]:
    """The arms called `names`; "all" stands for every optimization, "peers" for every peer, "negative" for every negative
    result, which has been measured before. Optimizations joined by `JOIN` are one arm, the combination of them. Raises
    UserError for an unknown name, and for what can't be combined."""
    known = registry.discover()
    peers = {peer.name: peer for peer in PEERS}
    negative = [name for name in known if registry.is_negative(name)]
    groups = {"all": [name for name in known if name not in negative], "peers": list(peers), "negative": negative}
    chosen = list(dict.fromkeys(name for given in names for name in groups.get(given, [given])))
    joined = [name for name in chosen if JOIN in name]
    unknown = [name for given in chosen for name in given.split(JOIN) if name not in known and name not in peers]
    if unknown:
        raise UserError(f"--arms {unknown[0]}: no such arm; there are {', '.join([*groups, *known, *peers])}")
    if len(joined) > 1:
        raise UserError(f"--arms {joined[1]}: a second combination; a run has one of its own choosing")

    def plan(name: str) -> ArmPlan:
        if name in joined:
            return _joined_arm(name, config, device)
        return _peer_arm(peers[name], config, device) if name in peers else _optimization_arm(known[name], config, device)

    return [plan(name) for name in chosen]


def _joined_arm(given: str, config: Config, device: torch.device) -> ArmPlan:
    """The combination that a command asks for by name: gated and timed as a whole, whether or not its parts ever were."""
    known, names = registry.discover(), given.split(JOIN)
    for index, name in enumerate(names):
        if name not in known or registry.is_negative(name) or registry.with_recipes(config, [name]) != config:
            raise UserError(f"--arms {given}: {name} can be part of no combination here")
        if name in names[:index]:
            raise UserError(f"--arms {given}: {name} is there twice")
        check_apart(name, names[:index], conflict, f"--arms {given}")
    lacking = ((name, registry.unmet(known[name].needs, device)) for name in names)
    missing = next((f"{name}: {reason}" for name, reason in lacking if reason is not None), None)
    members = [name for name in known if name in names]
    untimed = untimed_reason([known[name] for name in members], device)
    return dataclasses.replace(_combined(members, config), missing=missing, untimed=untimed)


def _optimization_arm(optimization: Optimization, config: Config, device: torch.device) -> ArmPlan:
    own = registry.with_recipes(config, [optimization.name])
    return ArmPlan(
        name=optimization.name,
        role="negative" if registry.is_negative(optimization.name) else "optimization",
        optimizations=(optimization.name,),
        config=own,
        claim=optimization.exactness,
        summary=optimization.summary,
        why_exact=optimization.why_exact,
        missing=registry.unmet(optimization.needs, device),
        untimed=untimed_reason([optimization], device),
        own_stock=own != config,
    )


def _peer_arm(peer: Peer, config: Config, device: torch.device) -> ArmPlan:
    """The gate asks of a peer what it asks of whoever claims ROUNDING; a peer itself claims nothing."""
    return ArmPlan(
        name=peer.name,
        role="peer",
        optimizations=(),
        config=dataclasses.replace(config, gradient_checkpointing=peer.checkpointing),
        claim=Exactness.ROUNDING,
        summary=peer.summary,
        why_exact="nobody says that it is: the gate was asked whether it trains the same model",
        missing=peer.missing(device),
        worker=peer.worker,
        versions=tuple(peer.versions().items()),
    )


def combination(ratios: Mapping[str, float], config: Config) -> ArmPlan | None:
    """The arm with every one of `ratios` on, in their order; None for fewer than two.

    ratios: stock's time over an optimization's own, by its name. Of two that conflict the faster stays, of equals the first.
    """
    chosen: list[str] = []
    for name in sorted(ratios, key=lambda name: -ratios[name]):
        if not any(conflict(name, other) for other in chosen):
            chosen.append(name)
    kept = [name for name in ratios if name in chosen]
    return _combined(kept, config) if len(kept) > 1 else None


def conflict(one: str, other: str) -> bool:
    """Whether two optimizations can't be on together."""
    known = registry.discover()
    return one in known[other].conflicts or other in known[one].conflicts


def check_apart(name: str, others: Iterable[str], clashes: Callable[[str, str], bool], where: str) -> None:
    """Raises UserError, which begins with `where`, if `name` clashes with one of `others`."""
    clash = next((other for other in others if clashes(name, other)), None)
    if clash is not None:
        raise UserError(f"{where}: {name} and {clash} exclude one another")


def _combined(names: list[str], config: Config) -> ArmPlan:
    return ArmPlan(
        name="combination",
        role="combination",
        optimizations=tuple(names),
        config=config,
        claim=registry.weakest_claim(names),
        summary=f"{', '.join(names)} together",
        why_exact="each part by its own argument; the whole by its own gate",
    )


def arm_units(gate: GateConfig, blocks: int, own_stock: bool = False) -> int:
    """Units of work of an arm for the progress bar: a unit is a step of training, a probe batch or a block of timing."""
    return gate_units(gate) + blocks + own_stock * reference_units(gate)


def planned_units(gate: GateConfig, blocks: int, arms: list[ArmPlan], combine: bool) -> int:
    """Those of a whole run."""
    own = sum(arm_units(gate, blocks, plan.own_stock) for plan in arms)
    return reference_units(gate) + blocks + combine * arm_units(gate, blocks) + own


def untimed_reason(optimizations: list[Optimization], device: torch.device) -> str | None:
    """Why arms with these optimizations must not be timed on `device`, or None."""
    if device.type != "cuda" and any(optimization.needs.triton for optimization in optimizations):
        return "its Triton kernels run in Triton's interpreter here, whose speed says nothing"
    return None
