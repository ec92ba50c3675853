"""The daemon's books as Prometheus has them. Labels come from fixed lists: no id, no address.

Only exemplars name a transfer: the last one of each bucket of a histogram.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector, CollectorRegistry
from prometheus_client.samples import Exemplar

from kvferry_daemon.core.meters import Stall, Times
from kvferry_daemon.core.node import AnyTransfer, Node
from kvferry_daemon.core.report import our_version
from kvferry_daemon.http.facts import Facts
from kvferry_proto import control
from kvferry_proto.errors import Code
from kvferry_proto.states import Role, StallReason, State

RESUMES = ("accepted", "repeated", "stale")
MOVES = ("sent", "received", "copied")
DROPS = (  # counters of what was read or made in vain
    "chunks_drained", "chunks_missed", "bad_messages_worker", "bad_messages_peer",
    "bad_messages_control", "unsendable_messages", "news_lost", "effects_failed",
    "log_dropped", "audit_dropped",
)  # fmt: skip
REFUSALS = (  # counters of who was let in no further, by a bound or because he may not
    "connections_refused", "connections_over_bound_worker", "connections_over_bound_peer",
    "connections_over_bound_control", "connections_cut_for_memory", "handshakes_refused",
    "http_refused", "messages_over_rate_worker", "messages_over_rate_peer",
    "messages_over_rate_control", "messages_over_rate_source", "sources_shunned",
    "refused_resource_exhausted", "operators_refused", "peers_not_trusted",
    "refused_not_your_transfer", "peer_refused_resource_exhausted", "aux_over_bound",
)  # fmt: skip
LATE_MS = (2, 10, 100)
TURN_MS = (1, *LATE_MS)
EXEMPLAR_ID_MAX = 128 - len("transfer_id")  # a longer one makes the whole scrape invalid


def render(registry: CollectorRegistry, accept: str) -> tuple[bytes, str]:
    """All metrics in the format that is asked for, and its content type."""
    encode, content_type = choose_encoder(accept)
    return encode(registry), content_type


class NodeCollector(Collector):
    """Reads the books when somebody asks; between scrapes it costs nothing."""

    def __init__(self, node: Node, facts: Facts) -> None:
        self._node = node
        self._facts = facts
        self._stalled_s: defaultdict[Stall, float] = defaultdict(float)  # as shown last

    def collect(self) -> Iterator[Metric]:
        """Every family, in one walk over the live transfers."""
        live = list(self._node.transfers.values())
        yield InfoMetricFamily("kvferry_build", "Which daemon", {"version": our_version()})
        yield _gauge("kvferry_draining", "1 while no new transfers are taken", self._node.draining)
        words = "1 while whoever reaches the peer socket from elsewhere may pull payload"
        yield _gauge("kvferry_insecure", words, self._facts.insecure)
        yield _gauge("kvferry_workers", "Sessions of workers", len(self._node.sessions))
        yield from self._transfers(live)
        yield from self._stalls(live)
        yield from self._moved(live)
        yield from self._pools()
        yield from self._times()
        yield from self._loop()
        yield from self._drops()

    def _transfers(self, live: list[AnyTransfer]) -> Iterator[Metric]:
        now = GaugeMetricFamily(
            "kvferry_transfers", "Transfers that are in the books now", labels=("role", "state")
        )
        states: Counter[tuple[Role, State]] = Counter()
        stalls: Counter[Stall] = Counter()
        for kind, count in self._node.census.kinds.items():
            states[kind.role, kind.state] += count
            if kind.stall is not None:
                stalls[kind.role, kind.stall] += count
        for role in Role:
            for state in State:
                now.add_metric((role.value, state.name.lower()), states[role, state])
        yield now
        waiting = GaugeMetricFamily(
            "kvferry_transfers_stalled", "Of them those that wait", labels=("role", "reason")
        )
        for role, reason in _waits():
            waiting.add_metric((role.value, reason.value), stalls[role, reason])
        yield waiting
        now_s = self._facts.now_s()
        oldest = max((now_s - t.progress_s for t in live if not t.ended), default=0.0)
        words = "How long the live transfer that waits longest has made no progress"
        yield _gauge("kvferry_transfer_idle_seconds_max", words, max(0.0, oldest))
        for what in ("opened", "success"):
            family = CounterMetricFamily(
                f"kvferry_transfers_{what}", f"Transfers that have {what}", labels=("role",)
            )
            for role in Role:
                family.add_metric((role.value,), self._node.counters[f"{role.value}_{what}"])
            yield family
        yield self._failed()

    def _failed(self) -> Metric:
        """Every code is there from the first: of one that comes with its first failure that is missed."""
        family = CounterMetricFamily(
            "kvferry_transfers_failed", "Transfers that have failed", labels=("role", "code")
        )
        for role in Role:
            for code in Code:
                labels = role.value, code.value
                family.add_metric(labels, self._node.meters.failed[role, code.value])
        return family

    def _stalls(self, live: Iterable[AnyTransfer]) -> Iterator[Metric]:
        meters, now_s = self._node.meters, self._facts.now_s()
        began = CounterMetricFamily(
            "kvferry_stalls", "Waits that began; waiting_for_resume: window waits",
            labels=("role", "reason"),
        )  # fmt: skip
        spent = CounterMetricFamily(
            "kvferry_stall_seconds", "Time of all transfers in waits", labels=("role", "reason")
        )
        lasting: defaultdict[Stall, float] = defaultdict(float)
        for transfer in live:
            if transfer.history.stall is not None:
                waited_s = max(0.0, now_s - transfer.history.stall_since_s)
                lasting[transfer.key.role, transfer.history.stall] += waited_s
        for stall in _waits():
            labels = tuple(part.value for part in stall)
            began.add_metric(labels, meters.stalls[stall])
            stalled_s = meters.stalled_s[stall] + lasting[stall]
            # A wait ends by its transfer's clock, which may lag behind ours (STALE_CLOCK_S).
            self._stalled_s[stall] = max(self._stalled_s[stall], stalled_s)
            spent.add_metric(labels, self._stalled_s[stall])
        yield began
        yield spent

    def _moved(self, live: Iterable[AnyTransfer]) -> Iterator[Metric]:
        node = self._node
        tokens = CounterMetricFamily("kvferry_tokens", "Tokens sent or received", labels=("role",))
        for role in Role:
            going = sum(
                t.sent_tokens - t.opening.start_tokens
                for t in live
                if t.key.role is role and not t.ended
            )
            tokens.add_metric((role.value,), node.meters.tokens[role] + going)
        yield tokens
        moved = CounterMetricFamily("kvferry_bytes", "Payload bytes", labels=("way",))
        chunks = CounterMetricFamily("kvferry_chunks", "Chunks", labels=("way",))
        for way in MOVES:
            moved.add_metric((way,), node.counters[f"bytes_{way}"])
            chunks.add_metric((way,), node.counters[f"chunks_{way}"])
        yield moved
        yield chunks
        resumes = CounterMetricFamily("kvferry_resumes", "Resumes of workers", labels=("outcome",))
        for outcome in RESUMES:
            resumes.add_metric((outcome,), node.counters[f"resumes_{outcome}"])
        yield resumes

    def _pools(self) -> Iterator[Metric]:
        """Summed by device: there may be a pool for every layout."""
        blocks = GaugeMetricFamily(
            "kvferry_pool_blocks", "Blocks of all pools", labels=("device", "state")
        )
        counts: Counter[tuple[str, str]] = Counter()
        for book in self._node.books.values():
            pool, device = book.pool, book.device
            counts[device, "free"] += pool.free_blocks
            counts[device, "leased"] += pool.leased_blocks
            counts[device, "quarantined"] += pool.quarantined_blocks
        for labels, count in sorted(counts.items()):
            blocks.add_metric(labels, count)
        yield blocks
        yield from self._quotas()
        yield _gauge("kvferry_pools", "Pools", len(self._node.books))
        peers = GaugeMetricFamily("kvferry_peers", "Daemons pulled from", labels=("state",))
        states = Counter(peer.state for peer in self._node.sinks.peers.values())
        for state in ("connecting", "up", "lost"):
            peers.add_metric((state,), states[state])
        yield peers

    def _quotas(self) -> Iterator[Metric]:
        """A role whose quota is used up waits, however much is free. A sum would hide the pool."""
        held: Counter[tuple[str, str]] = Counter()
        quotas: Counter[tuple[str, str]] = Counter()
        fullest: defaultdict[tuple[str, str], float] = defaultdict(float)
        for book in self._node.books.values():
            for role in Role:
                labels, blocks, quota = (book.device, role.value), book.held(role), book.quota(role)
                held[labels] += blocks
                quotas[labels] += quota
                fullest[labels] = max(fullest[labels], blocks / quota if quota else 0.0)
        for name, words, values in (
            ("held_blocks", "Blocks that a role's transfers hold or have set aside", held),
            ("quota_blocks", "Blocks that a role's transfers may hold", quotas),
            ("fullest_ratio", "Held of the quota, in the pool where that is most", fullest),
        ):
            family = GaugeMetricFamily(f"kvferry_pool_{name}", words, labels=("device", "role"))
            for labels, value in sorted(values.items()):
                family.add_metric(labels, value)
            yield family

    def _times(self) -> Iterator[Metric]:
        meters = self._node.meters
        chunk = HistogramMetricFamily(
            "kvferry_chunk_seconds", "From asking for a chunk to having it in place"
        )
        chunk.add_metric((), _buckets(meters.chunk_s), meters.chunk_s.sum_s)
        yield chunk
        whole = HistogramMetricFamily(
            "kvferry_transfer_seconds", "From opening to the end, well or not", labels=("role",)
        )
        for role, times in meters.transfer_s.items():
            whole.add_metric((role.value,), _buckets(times), times.sum_s)
        yield whole

    def _loop(self) -> Iterator[Metric]:
        loop = self._facts.loop()
        yield CounterMetricFamily("kvferry_loop_looks", "Looks at the event loop", value=loop.looks)
        late = CounterMetricFamily("kvferry_loop_late", "Of them later than", labels=("over",))
        for ms in LATE_MS:
            late.add_metric((f"{ms}ms",), getattr(loop, f"late_over_{ms}_ms"))
        yield late
        words = "The latest since the start"
        yield _gauge("kvferry_loop_late_seconds_max", words, loop.late_max_ms / 1000)
        if loop.turns is not None:
            yield from _turns(loop.turns)

    def _drops(self) -> Iterator[Metric]:
        drops = CounterMetricFamily(
            "kvferry_drops", "Chunks and messages that came to nothing", labels=("reason",)
        )
        for reason in DROPS:
            drops.add_metric((reason,), self._node.counters[reason])
        drops.add_metric(("messages_not_sent",), self._facts.not_sent())
        yield drops
        refused = CounterMetricFamily(
            "kvferry_refused", "Connections, messages and requests refused", labels=("reason",)
        )
        for reason in REFUSALS:
            refused.add_metric((reason,), self._node.counters[reason])
        yield refused
        lost = self._node.counters["peers_lost"]
        yield CounterMetricFamily("kvferry_peers_lost", "Peers that fell silent", value=lost)
        left_out = self._node.counters["audit_left_out"]
        words = "Deeds that the audit log only counts: more of a kind than it takes"
        yield CounterMetricFamily("kvferry_audit_left_out", words, value=left_out)


def _gauge(name: str, words: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, words, value=value)


def _waits() -> Iterator[Stall]:
    return ((role, reason) for role in Role for reason in StallReason)


def _turns(turns: control.TurnStatus) -> Iterator[Metric]:
    words = "Turns of the event loop, and what they wait in them for the GIL or a core"
    whole = HistogramMetricFamily("kvferry_loop_turn_seconds", words)
    buckets = [(str(ms / 1000), turns.turns - getattr(turns, f"over_{ms}_ms")) for ms in TURN_MS]
    whole.add_metric((), [*buckets, ("+Inf", turns.turns)], turns.seconds)
    yield whole
    yield _gauge("kvferry_loop_turn_seconds_max", "The longest", turns.max_ms / 1000)
    words = "Turns whose own work, CPU of the loop's thread, took longer than"
    long = CounterMetricFamily("kvferry_loop_work_long", words, labels=("over",))
    for ms in TURN_MS:
        long.add_metric((f"{ms}ms",), getattr(turns, f"work_over_{ms}_ms"))
    yield long
    yield _gauge("kvferry_loop_work_seconds_max", "The most work", turns.work_max_ms / 1000)


def _buckets(times: Times) -> list[Any]:
    """Prometheus counts upwards: each bucket has all that are below it too."""
    buckets, total = [], 0
    names = [*map(str, times.edges_s), "+Inf"]
    for name, count, last in zip(names, times.counts, times.last, strict=True):
        total += count
        exemplar = None
        if last is not None:
            exemplar = Exemplar({"transfer_id": last[0][:EXEMPLAR_ID_MAX]}, last[1])
        buckets.append((name, total, exemplar))
    return buckets
