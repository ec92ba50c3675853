from kvferry_proto.states import *
from world import *


def run(total, late=True, blocks=16, window=8, handoff=False, mode="consume", start=0):
    w = World(blocks=blocks, window_tokens=window)
    src, snk = b"ps", b"ds"
    sd = "b" if handoff else "a"
    w.hello(sd, src)
    w.hello("b", snk)
    print(
        type(
            w.call(sd, src, worker.Send(transfer_id="t", total_tokens=None if late else total))
        ).__name__
    )
    r = w.call(
        "b",
        snk,
        worker.Receive(
            transfer_id="t",
            source=None if handoff else "tcp://a:1",
            mode=mode,
            max_tokens=total if mode == "whole" else None,
            start_tokens=start,
        ),
    )
    seen = []
    resumes = []
    filled = start
    for i in range(300):
        w.wait(0.01)
        s = w.snapshot(sd, src, Role.SOURCE)
        edge = min(total, s.base_tokens + s.allocated_tokens)
        if s.state not in TERMINAL and (edge > s.available_tokens or s.total_tokens is None):
            w.fill(sd, s, edge)
            r = w.call(
                sd,
                src,
                worker.Ready(
                    transfer_id="t",
                    ready_tokens=edge,
                    total_tokens=total if edge == total else None,
                ),
            )
            assert isinstance(r, worker.Snapshots), r
        w.wait(0.01)
        k = w.snapshot("b", snk, Role.SINK)
        if k.state is State.SUCCESS or k.stall in (
            StallReason.WAITING_FOR_RESUME,
            StallReason.WAITING_FOR_BLOCKS,
        ):
            seen += w.read("b", k)
            if k.state is State.SUCCESS:
                break
            resumes.append(k.sent_tokens)
            w.call("b", snk, worker.Resume(transfer_id="t", sent_tokens=k.sent_tokens))
        w.beat()
    assert k.state is State.SUCCESS, (k, s)
    assert seen == [("t", 0, i) for i in range(start, total)], seen
    w.call("b", snk, worker.Release(transfer_id="t", role="sink"))
    w.call(sd, src, worker.Release(transfer_id="t", role="source"))
    w.wait(1)
    assert w.blocks_free("a") and w.blocks_free("b"), [
        (m.node.transfers) for m in w.machines.values()
    ]
    print(total, "ok; resumes", resumes, dict(w.machines["b"].node.counters))


for kw in (
    {},
    dict(late=False),
    dict(handoff=True),
    dict(handoff=True, late=False),
    dict(blocks=4),
):
    for total in (0, 1, 3, 4, 5, 8, 9, 16, 20, 37):
        run(total, **kw)
run(20, mode="whole")
run(20, mode="whole", handoff=True)
run(20, start=8)
run(20, start=8, handoff=True)
