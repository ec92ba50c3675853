"""A plan from a seed: how large, how many, how slow, and what goes wrong."""

from __future__ import annotations

from dataclasses import replace
from random import Random

from kvferry_proto.states import Role
from sim import faults
from sim.jobs import JobPlan, rank_process
from sim.memory import BLOCK, WIDE
from sim.world import Plan

FAULTS_MAX = 6
LONGEST_S = 4.0  # of one fault of the network: all together stay below the shortest deadline


def draw(seed: int, *, groups: bool = True, later: bool = True) -> Plan:
    """The same seed, the same plan.

    ``groups``: some requests have several ranks. ``later``: what was drawn last is drawn, too;
    seeds that failed once keep the plan that they failed with. The sides of some requests differ
    in ranks or in the size of blocks then, most of those within one daemon.
    """
    plan = _draw(seed, groups=groups, shapes=later)
    if not later:
        return plan
    on_the_loop = Random(f"on the loop {seed}").random() < 0.5  # no other draw moves by it
    return replace(_with_later(Random(f"later {seed}"), plan), on_the_loop=on_the_loop)


def _with_later(dice: Random, plan: Plan) -> Plan:
    plan = replace(plan, boards=dice.random() < 0.5)
    if dice.random() < 0.9:
        return plan
    for_s = _moment(dice, LONGEST_S)
    lost = faults.LoseSink(_moment(dice, 1.5), dice.randrange(4), for_s)
    calm_at_s = max(plan.calm_at_s, lost.at_s + for_s + 0.5)
    return replace(plan, calm_at_s=calm_at_s, faults=(*plan.faults, lost))


def _draw(seed: int, *, groups: bool, shapes: bool) -> Plan:
    dice = Random(seed)
    machines = ("a", "b", "c")[: dice.choice((2, 2, 2, 3))]
    window = dice.randint(1, 8)
    quota = window + dice.choice((0, 0, 1, 3, 8))
    jobs = tuple(_job(dice, n, machines, quota) for n in range(dice.choice((1, 1, 2, 2, 3, 4))))
    if groups:
        more_dice = Random(-1 - seed)
        jobs = tuple(_grouped(more_dice, job, quota) for job in jobs)
    if shapes:
        more_dice = Random(-1_000_000_007 - seed)
        jobs = tuple(_reshaped(more_dice, job, quota) for job in jobs)
    troubles = tuple(
        sorted(
            (_fault(dice, machines, jobs) for _ in range(dice.randint(0, FAULTS_MAX))),
            key=lambda fault: fault.at_s,
        )
    )
    ends_s = [fault.at_s + getattr(fault, "for_s", 0.0) for fault in troubles]
    return Plan(
        seed=seed,
        machines=machines,
        blocks=2 * quota,
        window_tokens=window * BLOCK,
        source_share=0.5,
        streams=dice.choice((1, 1, 2, 3)),
        chunk_blocks=dice.choice((1, 1, 2)),
        ledger_s=dice.choice((0.0004, 0.0004, 0.01)),
        aux=dice.random() < 0.2,
        calm_at_s=max(ends_s, default=0.0) + 0.5,
        jobs=jobs,
        faults=troubles,
    )


def _job(dice: Random, number: int, machines: tuple[str, ...], quota: int) -> JobPlan:
    sink = dice.choice(machines)
    others = [machine for machine in machines if machine != sink]
    source = sink if dice.random() < 0.2 else dice.choice(others)
    tokens = dice.choice((dice.randint(0, 12), dice.randint(0, 40)))
    start_sink = BLOCK * dice.randint(0, 3) if dice.random() < 0.2 else 0
    slack = dice.choice((0, 1, BLOCK))
    fits = -(-(tokens + slack) // BLOCK) <= quota and tokens + slack > 0
    started_s = _moment(dice, 0.5)
    return JobPlan(
        name=f"t{number}",
        source=source,
        sink=sink,
        source_process=f"{source}_prefill{dice.choice((0, 0, 1))}",
        sink_process=f"{sink}_decode{dice.choice((0, 0, 1))}",
        tokens=tokens,
        start_source=BLOCK * dice.randint(0, start_sink // BLOCK),
        start_sink=start_sink,
        window_source=dice.randint(1, quota * BLOCK),
        window_sink=dice.randint(1, quota * BLOCK),
        whole=fits and dice.random() < 0.3,
        max_tokens=start_sink + tokens + slack,
        late=dice.random() < 0.6,
        early_aux=dice.random() < 0.3,
        eager=dice.random() < 0.6,
        goodbye=dice.random() < 0.2,
        think_s=dice.choice((0.001, 0.005, 0.03)),
        ranks=1,
        ranks_sink=1,
        source_at_s=started_s + _moment(dice, 0.3),
        sink_at_s=started_s + _moment(dice, 0.3),
    )


def _grouped(dice: Random, job: JobPlan, quota: int) -> JobPlan:
    """The same request for a group, where as many blocks as it then needs are there."""
    ranks = dice.choice((1, 1, 1, 2, 2, 3))
    blocks = quota // ranks
    if ranks == 1 or blocks == 0:
        return job
    return replace(
        job,
        ranks=ranks,
        ranks_sink=ranks,
        window_source=min(job.window_source, blocks * BLOCK),
        window_sink=min(job.window_sink, blocks * BLOCK),
        whole=job.whole and -(-(job.max_tokens - job.start_sink) // BLOCK) <= blocks,
    )


def _reshaped(dice: Random, job: JobPlan, quota: int) -> JobPlan:
    """One in four: the sides differ, where each has room for it then."""
    if dice.random() >= 0.25:
        return job
    source = job.sink if dice.random() < 0.8 else job.source
    sizes = dice.choice(((BLOCK, WIDE), (WIDE, BLOCK), (BLOCK, BLOCK), (WIDE, WIDE)))
    ranks = dice.choice(
        ((1, 1), (2, 2), (1, 2), (2, 1)) if sizes[0] != sizes[1] else ((1, 2), (2, 1))
    )
    source_blocks = round(quota / 2) if sizes[0] == WIDE else quota
    sink_blocks = quota - round(quota / 2) if sizes[1] == WIDE else quota
    room = source_blocks // ranks[0], sink_blocks // ranks[1]
    if 0 in room:
        return job
    start_sink = job.start_sink // sizes[1] * sizes[1]
    max_tokens = job.max_tokens - job.start_sink + start_sink
    return replace(
        job,
        source=source,
        source_process=_process(source, sizes[0], "prefill", job.source_process),
        sink_process=_process(job.sink, sizes[1], "decode", job.sink_process),
        ranks=ranks[0],
        ranks_sink=ranks[1],
        start_source=min(job.start_source, start_sink) // sizes[0] * sizes[0],
        start_sink=start_sink,
        window_source=min(job.window_source, room[0] * sizes[0]),
        window_sink=min(job.window_sink, room[1] * sizes[1]),
        max_tokens=max_tokens,
        whole=job.whole and -(-(max_tokens - start_sink) // sizes[1]) <= room[1],
    )


def _process(machine: str, size: int, what: str, before: str) -> str:
    """The name of a process that has blocks of this size."""
    return f"{machine}_{'wide' if size == WIDE else ''}{what}{before[-1]}"


def _moment(dice: Random, most_s: float) -> float:
    """Small ones are as likely as large ones: much happens within a few milliseconds."""
    return most_s * 10 ** dice.uniform(-2.5, 0.0)


def _fault(dice: Random, machines: tuple[str, ...], jobs: tuple[JobPlan, ...]) -> faults.Fault:
    at_s = _moment(dice, 1.5)
    for_s = _moment(dice, LONGEST_S)
    machine = dice.choice(machines)
    job = dice.choice(jobs)
    process = dice.choice((job.source_process, job.sink_process))
    ranks = job.ranks if process == job.source_process else job.ranks_sink
    if ranks > 1:
        process = rank_process(process, dice.randrange(ranks))
    kind = dice.choices(range(len(_WEIGHTS)), _WEIGHTS)[0]
    match kind:
        case 0:
            slow_s = dice.choice((0.0, 0.05, 1.0))
            return faults.Weather(
                at_s, for_s, dice.choice((0.0, 0.3, 0.7)), dice.choice((0.0, 0.5)), slow_s
            )
        case 1:
            other = dice.choice([one for one in machines if one != machine])
            return faults.Partition(at_s, for_s, machine, other)
        case 2:
            return faults.Cut(at_s, dice.randrange(8))
        case 3:
            return faults.Damage(at_s, dice.randint(1, 3))
        case 4:
            return faults.Freeze(at_s, for_s)
        case 5:
            return faults.KillWorker(at_s, process, for_s)
        case 6:
            return faults.StopWorker(at_s, process, 2 * for_s)
        case 7:
            return faults.IpcWeather(at_s, for_s / 4, dice.choice((0.0, 0.5)), 0.5)
        case 8:
            return faults.Reconnect(at_s, process)
        case 9:
            return faults.Cancel(at_s, dice.randrange(4), dice.choice(tuple(Role)))
        case 10:
            return faults.Retry(at_s, dice.randrange(4))
        case 11:
            return faults.Jump(at_s, machine, dice.choice((0.2, 1.0, 5.0, 40.0)))
        case 12:
            return faults.PauseDaemon(at_s, machine, dice.choice((for_s / 4, 2 * for_s)))
        case 13:
            return faults.KillDaemon(at_s, machine, for_s, dice.random() < 0.7)
        case 14:
            return faults.KillAtWrite(at_s, machine, dice.randint(1, 30), for_s)
        case 15:
            return faults.NoPool(0.0, machine, dice.randint(1, 3))
        case _:
            return faults.SlowZero(at_s, machine, dice.choice((0.1, 1.0)))


_WEIGHTS = (4, 2, 4, 2, 2, 2, 2, 2, 1, 2, 3, 1, 1, 2, 3, 1, 1)
