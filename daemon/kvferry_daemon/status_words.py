"""A daemon's status in words and tables."""

from kvferry_daemon.operator import page, size_in_words, table
from kvferry_proto import control

POOL_COLUMNS = (
    *("pool", "block", "total", "free", "leased", "quarantined"),
    *("sources", "sinks", "largest run"),
)


def status_for_people(answer: control.Status) -> str:
    """A status in words and tables."""
    about = f"kvferry {answer.version}  pid {answer.pid}"
    drain = ", draining" if answer.draining else ""
    states = ", ".join(f"{count} {name}" for name, count in answer.transfers.items()) or "none"
    stalls = ", ".join(f"{count} {name}" for name, count in answer.stalls.items()) or "none"
    words = [
        f"{about}  up {answer.uptime_s:.0f} s{drain}  boot {answer.boot_id}",
        f"peers connect to {answer.peer_address}; {answer.workers} workers",
        f"transfers: {states}; waiting: {stalls}",
    ]
    if answer.rates is not None:
        words.append(_moved(answer.rates))
    if answer.security is not None:
        words.append(secured_in_words(answer.security))
    if answer.placement is not None:
        words.insert(2, _placed(answer.placement))
    if answer.loop is not None:
        words += _late(answer.loop)
    pools = (
        (
            f"{pool.device} {len(pool.planes)} planes",
            f"{pool.block_size_tokens} tokens, {size_in_words(pool.block_bytes)}",
            str(pool.blocks_total),
            str(pool.blocks_free),
            str(pool.blocks_leased),
            str(pool.blocks_quarantined),
            _of_quota(pool.source_held_blocks, pool.source_blocks),
            _of_quota(pool.sink_held_blocks, pool.sink_blocks),
            str(pool.largest_run_blocks),
        )
        for pool in answer.pools
    )
    peers: list[tuple[str, ...]] = [
        (p.address, "source", p.state, str(p.streams_open), p.transport, p.detail or p.why)
        for p in answer.peers
    ]
    peers += [
        (s.address or s.name, "sink", s.state, str(s.streams_open), s.transport, _heard(s))
        for s in answer.sinks or ()
    ]
    workers = (
        (s.name, s.user, str(s.transfers), "lost" if s.lost else "") for s in answer.sessions or ()
    )
    return page(
        words,
        table(POOL_COLUMNS, pools),
        table(("peer", "role", "state", "streams", "transport", "detail"), peers),
        table(("worker", "uid:gid:pid", "transfers", "state"), workers),
    )


def _heard(sink: control.SinkStatus) -> str:
    named = f"trusted as {sink.name}; " if sink.name else ""
    return f"{named}heard {sink.heard_s:.1f} s ago"


def _of_quota(held: int | None, quota: int) -> str:
    """A role waits when it has all of its quota, however much is free."""
    return f"{'?' if held is None else held} of {quota}"


def _moved(rates: control.RateStatus) -> str:
    sent, received, copied = (
        size_in_words(round(rate))
        for rate in (rates.bytes_sent, rates.bytes_received, rates.bytes_copied)
    )
    tokens = f"{rates.tokens_sent:.0f} tokens/s sent, {rates.tokens_received:.0f} received"
    size = f"{sent}/s sent, {received}/s received, {copied}/s copied"
    return f"in the last {rates.seconds:.0f} s: {tokens}; {size}"


def _placed(placement: control.PlacementStatus) -> str:
    node = "" if placement.numa_node is None else f" on NUMA node {placement.numa_node}"
    cpus = placement.copy_cpus or "any"
    return f"pools{node}; huge pages: {placement.huge_pages}; copied on CPUs: {cpus}"


def secured_in_words(security: control.SecurityStatus) -> str:
    """How daemons talk to this one."""
    if security.insecure:
        return "INSECURE: whoever reaches the peer socket may pull, and nothing is encrypted"
    if security.messages == "clear":
        words = "peers: messages in clear, on this machine only"
    else:
        words = f"peers: messages by CURVE, {security.trusted_keys} keys trusted"
    return f"{words}; payload {'by TLS' if security.payload == 'tls' else 'in clear'}"


def _late(loop: control.LoopStatus) -> list[str]:
    often = f"{loop.late_over_10_ms} of {loop.looks} looks over 10 ms late"
    words = f"event loop: {often}, at most {loop.late_max_ms:.1f} ms"
    if (turns := loop.turns) is None:
        return [words]
    long = f"{turns.over_1_ms} of {turns.turns} over 1 ms, at most {turns.max_ms:.1f} ms"
    work = f"{turns.work_over_1_ms} over 1 ms, at most {turns.work_max_ms:.1f} ms"
    return [words, f"loop turns: {long}; own work: {work}"]
