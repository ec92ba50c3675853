"""The data connections of sinks, as the source's daemon counts them."""

import random
from collections import Counter

import pytest

from kvferry_daemon.core import outside as out
from kvferry_daemon.core.events import Key, StreamDown, StreamKey
from kvferry_daemon.core.sink_streams import OF_ONE_MAX, TICKET_S, SinkStreams
from kvferry_proto import peer, worker
from kvferry_proto.errors import Code, FerryError
from kvferry_proto.states import Role
from world import BLOCK, World

LINK, OTHER = "1" * 16, "2" * 16
SOURCE = b"source worker"


def key(connection: int, stream: int = 0, link: str = LINK) -> StreamKey:
    return StreamKey(link, stream, connection)


def refused(streams: SinkStreams, one: StreamKey, whose: str, now_s: float = 0.0) -> bool:
    try:
        assert streams.admit(one, whose, now_s)
    except FerryError as error:
        return (error.code, error.retry_after_s) == (Code.RESOURCE_EXHAUSTED, TICKET_S)
    return False


def test_only_the_newest_connection_of_a_stream_may_come() -> None:
    streams = SinkStreams()
    assert streams.admit(key(1), "peer", 0.0)
    assert streams.admit(key(2), "peer", 0.0)
    assert not streams.came(key(1), "peer")  # its ticket was shown before it was revoked
    assert streams.before(key(2)) == [key(1)]
    assert streams.came(key(2), "peer")
    assert not streams.admit(key(2), "peer", 0.0)  # its number is used up
    assert streams.admit(key(3), "peer", 0.0)
    assert streams.before(key(3)) == [key(1), key(2)]
    streams.ended(key(1))
    assert streams.before(key(3)) == [key(2)]
    assert key(1) not in streams
    assert key(2) in streams


def test_a_peer_has_so_many_tickets_and_connections_together() -> None:
    streams = SinkStreams()
    many = [key(0, stream, f"{link:016x}") for link in range(40) for stream in range(16)]
    for one in many[:OF_ONE_MAX]:
        assert not refused(streams, one, "hog")
    assert refused(streams, many[OF_ONE_MAX], "hog")
    assert not refused(streams, key(0), "honest")
    assert not refused(streams, many[0]._replace(connection=1), "hog")  # in its own ticket's place
    assert streams.came(many[1], "hog")
    assert refused(streams, many[OF_ONE_MAX], "hog")
    streams.ended(many[1])
    assert not refused(streams, many[OF_ONE_MAX], "hog")
    assert refused(streams, many[-1], "hog", TICKET_S - 1)
    assert not refused(streams, many[-1], "hog", TICKET_S)


def test_a_link_that_is_over_leaves_its_tickets_counted() -> None:
    """Else one link after the other would have its own."""
    streams = SinkStreams()
    for number in range(OF_ONE_MAX):
        link = f"{number:016x}"
        assert not refused(streams, key(0, 0, link), "hog")
        assert streams.forget(link) == []
    assert refused(streams, key(0), "hog")


def test_all_peers_together_have_so_many() -> None:
    streams = SinkStreams()
    streams.connections_max = 3
    for number in range(3):
        assert not refused(streams, key(0, number), str(number))
        assert streams.came(key(0, number), str(number))
    assert refused(streams, key(0, 3), "late")
    streams.ended(key(0, 1))
    assert not refused(streams, key(0, 3), "late")


@pytest.mark.parametrize("seed", range(20))
def test_the_books_add_up_whatever_comes(seed: int) -> None:
    dice, streams, now_s = random.Random(seed), SinkStreams(), 0.0
    for _ in range(300):
        now_s += dice.random()
        one = key(dice.randrange(6), dice.randrange(2), dice.choice((LINK, OTHER)))
        match dice.randrange(4):
            case 0:
                streams.admit(one, dice.choice("ab"), now_s)
            case 1 if one not in streams:
                streams.came(one, dice.choice("ab"))
            case 2:
                streams.ended(one)
            case 3 if dice.random() < 0.1:
                streams.forget(one.peer)
        whose = [*streams._open.values(), *(one.whose for one in streams._tickets.values())]
        assert Counter(whose) == streams._held
        assert sum(map(len, streams._of.values())) == len(streams)


def test_a_connection_that_is_not_the_newest_is_thrown_out_as_it_comes() -> None:
    node = World().machines["a"].node
    hello = peer.PeerHello(boot_id=LINK, daemon_id=LINK, life=1)
    node.handle(out.SinkSaid(b"route", hello), 0.0)
    for number in (1, 2):
        ask = peer.OpenStream(
            stream=0, connection=number, source_boot_id="a" * 16, sink_boot_id=LINK
        )
        node.handle(out.SinkSaid(b"route", ask), 0.0)
    assert node.handle(out.SourceStreamUp(key(1)), 0.0) == [out.Expel(key(1))]
    assert node.handle(out.SourceStreamUp(key(2)), 0.0) == []
    assert node.counters["streams_expelled"] == 1


def test_the_end_of_a_connection_reaches_only_whom_something_was_sent_for() -> None:
    """Each of 20,000 transfers heard of each one, and anybody may connect again and again."""
    streams = SinkStreams()
    one, other = (Key(Role.SOURCE, name, 0) for name in ("one", "other"))
    assert not streams.reads(key(1), one)
    for number in (1, 2):
        streams.came(key(number), "peer")
        assert streams.reads(key(number), one)
    assert streams.reads(key(2), other)
    streams.forget_transfer(other, [key(1), key(2)])
    assert list(streams.ended(key(1))) == [one]
    assert list(streams.ended(key(2))) == [one]
    assert not streams.ended(key(2))
    assert not streams._read_for


def test_a_source_that_is_read_hears_of_the_end_and_the_others_do_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World()
    world.hello("a", SOURCE)
    node = world.machines["a"].node
    for name in ("read", "other"):
        world.call("a", SOURCE, worker.Send(transfer_id=name))
        world.call(
            "a", SOURCE, worker.Ready(transfer_id=name, ready_tokens=BLOCK, total_tokens=BLOCK)
        )
    world.feed("a", out.SinkSaid(b"route", peer.PeerHello(boot_id=LINK, daemon_id=LINK, life=1)))
    world.feed("a", out.SourceStreamUp(key(1)))
    wanted = [(one, 0) for one in range(3)] + [(1, 9)]
    want = [peer.Want(first_token=0, tokens=BLOCK, stream=s, connection=c) for c, s in wanted]
    pull = peer.Pull(
        transfer_id="read",
        attempt=0,
        number=1,
        handle=0,
        layout_digest=next(iter(node.books.values())).layout.digest,
        start_tokens=0,
        acked_tokens=0,
        want=want,
    )
    said = peer.Pulls(source_boot_id="a" * 16, sink_boot_id=LINK, pulls=[pull])
    effects = node.handle(out.SinkSaid(b"route", said), 0.0)
    assert [one.key for one in effects if isinstance(one, out.Transmit)] == [key(1)]
    assert node.counters["wants_dropped"] == len(wanted) - 1
    world.call("a", SOURCE, worker.Abort(transfer_id="read", role=Role.SOURCE))
    assert world.snapshot("a", SOURCE, Role.SOURCE, "read").runs  # a thread reads them
    told: list[tuple[Key, object]] = []
    plain = node.tell

    def tell(to: dict[Key, None], event: object) -> None:
        told.extend((key, event) for key in to)
        plain(to, event)

    monkeypatch.setattr(node, "tell", tell)
    world.feed("a", out.SourceStreamDown(key(1), "cut"))
    assert told == [(Key(Role.SOURCE, "read", 0), StreamDown(key(1)))]
    assert not world.snapshot("a", SOURCE, Role.SOURCE, "read").runs
