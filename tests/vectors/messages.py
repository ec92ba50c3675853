"""The messages of the golden frames: every kind at its smallest, and the edges of its fields."""

from typing import Any

from kvferry_proto import control as c
from kvferry_proto import peer as p
from kvferry_proto import worker as w
from kvferry_proto.errors import Code
from kvferry_proto.fields import TOKENS_MAX, ErrorInfo
from kvferry_proto.layout import Dtype, Layout, Order, Plane
from kvferry_proto.states import Mode, Role, StallReason, State
from kvferry_proto.versions import Versions

BIG = (1 << 63) - 1
SOURCE, SINK = "5" * 32, "a" * 16
SECRET = "0123456789abcdef" * 4
LINK: dict[str, Any] = {"source_boot_id": SOURCE, "sink_boot_id": SINK}
DIGEST = bytes(range(0xF0, 0x100))
TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
ERROR = ErrorInfo.of(Code.RESUME_AHEAD, "resume at 9 is above sent_tokens 8")
AUX: dict[str, int | float | str | bytes] = {
    "n": -(1 << 63),
    "m": BIG,
    "f": 1.0,
    "g": -0.5,
    "s": "\u00e9\u4e2d\U0001f600",
    "b": b"\0\xff",
}

KV = Layout(
    planes=(
        Plane(name="layer.0.k", dtype=Dtype.BFLOAT16, shape=(8, 128)),
        Plane(name="layer.0.v", dtype=Dtype.BFLOAT16, shape=(8, 128)),
    )
)
EMBEDDING = Layout(
    planes=(
        Plane(name="embedding", dtype=Dtype.FLOAT32, shape=(3,)),
        Plane(name="fill_ids", dtype=Dtype.INT64),
        Plane(name="is_image", dtype=Dtype.BOOL),
    ),
    aux=("rope_delta", "text"),
    block_size_tokens=7,
)
RANK = Layout(
    planes=(
        Plane(name="k", dtype=Dtype.FLOAT8_E4M3FN, shape=(2, 5), heads_total=8, order=Order.HND),
        Plane(name="v", dtype=Dtype.BFLOAT16, shape=(1, 3), heads_total=2),
        Plane(name="latent", dtype=Dtype.BFLOAT16, shape=(9,), order=Order.HND),
    ),
    block_size_tokens=16,
)
LAYOUTS = {
    "two planes of a cache": KV,
    "planes that need padding, scalars, aux": EMBEDDING,
    "one rank's heads, and both orders": RANK,
    "one byte": Layout(planes=(Plane(name="x", dtype=Dtype.UINT8),), block_size_tokens=1),
}

WATCHED = w.Watched(role=Role.SINK, transfer_id="t")
CALLS: dict[str, Any] = {
    "first hello": w.Hello(call=1, lock="0f3a", layout=KV),
    "hello again, with a session": w.Hello(
        call=BIG, lock="a-_9", layout=EMBEDDING, session=SECRET, worker="decode \u00e9", pid=1 << 31
    ),
    "hello of a newer client": w.Hello(lock="x", layout=KV, versions=Versions(low=1, high=65535)),
    "hello of one rank": w.Hello(lock="r1", layout=RANK),
    "send": w.Send(transfer_id="req-1"),
    "send with everything": w.Send(
        call=2, transfer_id="!~" * 64, attempt=1 << 31, start_tokens=128, total_tokens=TOKENS_MAX,
        aux=AUX, window_tokens=0,
    ),
    "send in a trace": w.Send(transfer_id="t", traceparent=TRACE),
    "ready": w.Ready(call=3, transfer_id="t", ready_tokens=8192),
    "ready for the last time": w.Ready(
        transfer_id="t", attempt=1, ready_tokens=8193, total_tokens=8193, aux={}
    ),
    "receive": w.Receive(transfer_id="t"),
    "receive whole, from elsewhere": w.Receive(
        call=4, transfer_id="t", source="tcp://10.0.0.7:7000", mode=Mode.WHOLE, start_tokens=256,
        window_tokens=4096, max_tokens=65536,
    ),
    "receive in a trace": w.Receive(transfer_id="t", traceparent=TRACE),
    "poll": w.Poll(call=5, transfers=[WATCHED]),
    "poll that waits": w.Poll(
        call=6, wait_s=60.0,
        transfers=[w.Watched(role=Role.SOURCE, transfer_id="t", attempt=2, after=BIG), WATCHED],
    ),
    "poll for a slot on the board": w.Poll(transfers=[WATCHED], board=True),
    "resume": w.Resume(call=7, transfer_id="t", sent_tokens=8192),
    "resume at 0": w.Resume(transfer_id="t", sent_tokens=0),
    "release": w.Release(call=8, transfer_id="t", role=Role.SINK),
    "abort": w.Abort(call=9, transfer_id="t", role=Role.SOURCE),
    "abort with a reason": w.Abort(transfer_id="t", role=Role.SINK, reason="x" * 300),
    "heartbeat": w.Heartbeat(),
    "batch": w.Batch(
        call=10, calls=[w.Heartbeat(call=11), w.Resume(call=12, transfer_id="t", sent_tokens=1)]
    ),
}  # fmt: skip

SNAPSHOT = w.Snapshot(
    role=Role.SINK, transfer_id="t", attempt=0, snapshot=1, state=State.BOOTSTRAPPING
)
FULL = w.Snapshot(
    role=Role.SOURCE, transfer_id="t", attempt=3, snapshot=1 << 40, state=State.TRANSFERRING,
    stall=StallReason.WAITING_FOR_RESUME, start_tokens=128, sent_tokens=8320,
    partial_sent_tokens=200, last_resume_at=200, total_tokens=20480, available_tokens=9000,
    base_tokens=128, allocated_tokens=8192, target_tokens=8320, runs=[(0, 60), (1 << 20, 4)],
    aux=AUX,
)  # fmt: skip
FAILED = SNAPSHOT.model_copy(update={"state": State.FAILED, "error": ERROR, "snapshot": 9})
SHOWN = {
    "the smallest snapshot": SNAPSHOT,
    "a full snapshot, whose aux values are asked for": FULL,
    "a failed transfer, whose error is asked for": FAILED,
}
REPLIES: dict[str, Any] = {
    "welcome": w.Welcome(
        call=1, version=1, boot_id=SOURCE, session=SECRET, heartbeat_s=1.0,
        pool=w.PoolInfo(path="/run/kvferry/pools/\u00e9", blocks=1, block_bytes=64, window_tokens=8192),
        peer_address="tcp://127.0.0.1:7000",
    ),
    "welcome to a daemon with a board": w.Welcome(
        version=1, boot_id=SOURCE, session=SECRET, heartbeat_s=1.0, peer_address="",
        pool=w.PoolInfo(path="/p", blocks=1, block_bytes=64, window_tokens=0, board="/p.board"),
    ),
    "welcome to a pool in device memory": w.Welcome(
        version=1, boot_id=SOURCE, session=SECRET, heartbeat_s=1.0, peer_address="",
        pool=w.PoolInfo(
            path="", blocks=1, block_bytes=64, window_tokens=0,
            device=w.DeviceMemory(device="cuda:0", uuid=bytes(range(16)), handle=bytes(range(64))),
        ),
    ),
    "a snapshot that is on the board": w.Snapshots(
        transfers=[SNAPSHOT.model_copy(update={"slot": w.BoardSlot(index=4095, key=BIG)})]
    ),
    "snapshots without any": w.Snapshots(call=2),
    "the smallest snapshot": w.Snapshots(transfers=[SNAPSHOT]),
    "a full snapshot": w.Snapshots(call=BIG, transfers=[FULL]),
    "a failed transfer, a refused one": w.Snapshots(
        call=3, transfers=[FAILED],
        refused=[w.Refused(role=Role.SINK, transfer_id="u", attempt=0, error=ERROR)],
    ),
    "every stall": w.Snapshots(
        transfers=[SNAPSHOT.model_copy(update={"stall": stall}) for stall in StallReason]
    ),
    "every state": w.Snapshots(
        transfers=[SNAPSHOT.model_copy(update={"state": state}) for state in State]
    ),
    "failure": w.Failure(call=4, error=ERROR),
    "failure of a newer daemon": w.Failure(
        error=ErrorInfo(code="moon_phase", fault="moon", message="", remedy="wait")
    ),
    "batch reply": w.BatchReply(call=10, replies=[w.Snapshots(call=11), w.Failure(error=ERROR)]),
}  # fmt: skip

PULL = p.Pull(
    transfer_id="t", attempt=0, number=0, handle=0, layout_digest=DIGEST, start_tokens=0,
    acked_tokens=0,
)  # fmt: skip
NEWS = p.Progress(transfer_id="t", attempt=0, number=1, state=State.WAITING_FOR_INPUT)
PEER: dict[str, Any] = {
    "peer hello": p.PeerHello(boot_id=SINK, daemon_id=SOURCE, life=2),
    "peer hello with an address": p.PeerHello(
        boot_id=SINK, daemon_id=SOURCE, life=2, address="tcp://b:2"
    ),
    "peer welcome": p.PeerWelcome(version=1, boot_id=SOURCE, sink_boot_id=SINK),
    "ping": p.Ping(**LINK),
    "pong": p.Pong(news=BIG, **LINK),
    "open stream": p.OpenStream(stream=15, connection=BIG, **LINK),
    "open stream, with what else might be": p.OpenStream(
        stream=0, connection=1,
        ways=p.Ways(wish="auto", nixl="1.5.1", fast=False, why="no RDMA device"), **LINK,
    ),
    "ticket that names a transport": p.Ticket(
        stream=0, connection=1, port=1, ticket=DIGEST * 2, transport="nixl",
        why="the sink is set to it", **LINK,
    ),
    "open stream of a sink that encrypts": p.OpenStream(
        stream=0, connection=0, ways=p.Ways(payload_encryption="tls"), **LINK,
    ),
    "ticket of a source that encrypts": p.Ticket(
        stream=0, connection=0, port=1, ticket=DIGEST * 2, certificate_sha256=bytes(range(32)),
        **LINK,
    ),
    "ticket": p.Ticket(stream=0, connection=0, port=65535, ticket=DIGEST * 2, **LINK),
    "a pull that asks for news": p.Pulls(pulls=[PULL], **LINK),
    "a pull in a trace": p.Pulls(pulls=[PULL.model_copy(update={"traceparent": TRACE})], **LINK),
    "a pull that wants two extents": p.Pulls(
        pulls=[
            p.Pull(
                transfer_id="t", attempt=1, number=BIG, handle=BIG, layout_digest=bytes(16),
                start_tokens=128, acked_tokens=TOKENS_MAX,
                want=[
                    p.Want(first_token=0, tokens=1, stream=0, connection=0),
                    p.Want(first_token=128, tokens=1 << 32, stream=15, connection=7),
                ],
            )
        ],
        **LINK,
    ),
    "progress": p.Progresses(before=0, progresses=[NEWS], **LINK),
    "progress of an unknown transfer": p.Progresses(
        before=BIG,
        progresses=[NEWS.model_copy(update={"known": False, "state": State.BOOTSTRAPPING})], **LINK
    ),
    "progress with everything": p.Progresses(
        before=BIG,
        progresses=[
            p.Progress(
                transfer_id="t", attempt=2, number=3, state=State.FAILED, available_tokens=4,
                total_tokens=5, aux=AUX, error=ERROR, layout=EMBEDDING,
            )
        ],
        **LINK,
    ),
    "done": p.Done(transfer_id="t", attempt=0, state=State.SUCCESS, **LINK),
    "done and failed": p.Done(transfer_id="t", attempt=1, state=State.FAILED, error=ERROR, **LINK),
    "done noted": p.DoneNoted(transfer_id="t", attempt=0, **LINK),
    "peer refused": p.PeerRefused(boot_id=SOURCE, error=ERROR),
}  # fmt: skip

POOL = c.PoolStatus(
    device="host", path="/p", block_bytes=64, block_size_tokens=128, blocks_total=8, blocks_free=3,
    blocks_leased=4, blocks_quarantined=1, source_blocks=4, sink_blocks=4, largest_run_blocks=2,
    workers=1, planes=["layer.0.k"],
)  # fmt: skip
CONTROL: dict[str, Any] = {
    "get status": c.GetStatus(call=1),
    "get transfers": c.GetTransfers(),
    "get one transfer": c.GetTransfers(call=2, transfer_id="t", limit=1),
    "get some transfers": c.GetTransfers(
        state=State.TRANSFERRING, role=Role.SINK, stall=StallReason.WAITING_FOR_RESUME, worker="w",
        peer="tcp://a:1", age_s=1.5, idle_s=0.5, sort="idle",
    ),
    "explain": c.Explain(call=4, transfer_id="t"),
    "drain": c.SetDraining(call=5, draining=True),
    "abort": c.AbortTransfer(call=6, transfer_id="t"),
    "abort an attempt": c.AbortTransfer(transfer_id="t", attempt=2, reason="stuck"),
    "set log level": c.SetLogLevel(call=7, level="debug"),
    "status": c.Status(
        call=1, version="0.1.0", wire_versions=(1, 1), boot_id=SOURCE, pid=1, uptime_s=0.25,
        draining=False, peer_address="tcp://127.0.0.1:7000", runtime_dir="/run/kvferry", workers=1,
        blocks_total=8, blocks_free=3, transfers={"success": 2}, stalls={}, counters={"x": 1},
        pools=[POOL],
        peers=[
            c.PeerStatus(address="tcp://[::1]:1", state="connecting"),
            c.PeerStatus(
                address="tcp://b:2", state="up", boot_id=SINK, streams_open=2, transport="tcp", why="w",
                detail="all is well",
            ),
        ],
    ),
    "status with placement": c.Status(
        call=1, version="0.1.0", wire_versions=(1, 1), boot_id=SOURCE, pid=1, uptime_s=0.25,
        draining=False, peer_address="tcp://127.0.0.1:7000", runtime_dir="/run/kvferry", workers=1,
        blocks_total=0, blocks_free=0, transfers={}, stalls={}, counters={}, pools=[], peers=[],
        placement=c.PlacementStatus(huge_pages="within_size", numa_node=0, copy_cpus="0-3,8"),
    ),
    "status with lag": c.Status(
        call=1, version="0.1.0", wire_versions=(1, 1), boot_id=SOURCE, pid=1, uptime_s=0.25,
        draining=False, peer_address="tcp://127.0.0.1:7000", runtime_dir="/run/kvferry", workers=1,
        blocks_total=0, blocks_free=0, transfers={}, stalls={}, counters={}, pools=[], peers=[],
        loop=c.LoopStatus(
            looks=600, late_over_2_ms=3, late_over_10_ms=2, late_over_100_ms=1, late_max_ms=104.5
        ),
    ),
    "status with turns": c.Status(
        call=1, version="0.1.0", wire_versions=(1, 1), boot_id=SOURCE, pid=1, uptime_s=0.25,
        draining=False, peer_address="tcp://127.0.0.1:7000", runtime_dir="/run/kvferry", workers=1,
        blocks_total=0, blocks_free=0, transfers={}, stalls={}, counters={}, pools=[], peers=[],
        loop=c.LoopStatus(
            looks=600, late_over_2_ms=3, late_over_10_ms=0, late_over_100_ms=0, late_max_ms=4.5,
            turns=c.TurnStatus(
                turns=9000, seconds=1.5, over_1_ms=40, over_2_ms=30, over_10_ms=20, over_100_ms=10,
                max_ms=104.5, work_over_1_ms=4, work_over_2_ms=3, work_over_10_ms=2,
                work_over_100_ms=1, work_max_ms=100.25,
            ),
        ),
    ),
    "transfers": c.Transfers(
        call=2, more=1,
        transfers=[
            c.TransferStatus(snapshot=SNAPSHOT, worker="w", sink="tcp://b:2"),
            c.TransferStatus(
                snapshot=FULL, worker="", source="tcp://a:1", transport="tcp", age_s=1.5,
                idle_s=0.125, blocks=64, ended=True, workers=["", "w"], behind=[0],
            ),
        ],
    ),
    "status with more": c.Status(
        call=1, version="0.1.0", wire_versions=(1, 1), boot_id=SOURCE, pid=1, uptime_s=0.25,
        draining=True, peer_address="tcp://127.0.0.1:7000", runtime_dir="/run/kvferry", workers=1,
        blocks_total=0, blocks_free=0, transfers={}, stalls={}, counters={}, pools=[], peers=[],
        unsettled=3, log_level="info",
        rates=c.RateStatus(
            seconds=10.0, tokens_sent=8192.5, tokens_received=0.0, bytes_sent=1e9,
            bytes_received=0.0, bytes_copied=2.5,
        ),
        sinks=[
            c.SinkStatus(address="", state="silent", heard_s=12.5),
            c.SinkStatus(
                address="tcp://b:2", state="up", heard_s=0.25, name="b", streams_open=2,
                transport="tcp",
            ),
        ],
    ),
    "explanation": c.Explanation(
        call=4,
        transfers=[
            c.Explained(seen=c.TransferStatus(snapshot=SNAPSHOT, worker="w"), moments=[]),
            c.Explained(
                seen=c.TransferStatus(snapshot=SNAPSHOT, worker="w"),
                moments=[
                    c.Moment(ago_s=2.5, what="opened", state=State.BOOTSTRAPPING),
                    c.Moment(
                        ago_s=1.5, what="news", state=State.TRANSFERRING,
                        stall=StallReason.WAITING_FOR_BLOCKS, sent_tokens=128, available_tokens=256,
                        base_tokens=128, allocated_tokens=128,
                    ),
                ],
                moments_lost=1, stalled_s=1.5, waits_for="blocks", helps="more of them",
                holding="1 block", holders=[
                    c.Holder(transfer_id="u", role=Role.SINK, attempt=0, blocks=8),
                    c.Holder(
                        transfer_id="v", role=Role.SINK, attempt=1, blocks=4,
                        stall=StallReason.WAITING_FOR_RESUME,
                    ),
                ],
            ),
        ],
    ),
    "explanation of nothing": c.Explanation(call=4, transfers=[], near=["t-1", "t-2"]),
    "draining": c.Draining(call=5, draining=True, unsettled=2),
    "aborted": c.Aborted(call=6, transfers=[c.TransferStatus(snapshot=SNAPSHOT, worker="w")]),
    "log level set": c.LogLevelSet(call=7, level="debug", before="info"),
    "control failure": c.ControlFailure(call=3, error=ERROR),
}  # fmt: skip

MESSAGES = {"worker_calls": CALLS, "worker_replies": REPLIES, "peer": PEER, "control": CONTROL}
