"""How a sink asks its source, and what it has of it.

Progress is ``sent_tokens``: the gapless prefix of extents that were claimed, verified and
committed. Asking is level-triggered: every pull says what is wanted now, and a timer repeats it.
"""

from kvferry_daemon.core import events as ev
from kvferry_daemon.core.claims import Claims
from kvferry_daemon.core.extents import ExtentSet
from kvferry_daemon.core.news import what_is_wrong
from kvferry_daemon.core.transfer import Opening, Transfer
from kvferry_proto.errors import Code
from kvferry_proto.peer import Want

ACK_PARTS = 8  # an ack travels at least every window/8 tokens, so that the source can slide too


class PullingTransfer(Transfer):
    """The part of a sink that faces its source."""

    def __init__(self, opening: Opening, timing: ev.Timing, now_s: float) -> None:
        super().__init__(opening, timing, now_s)
        self.peer_up = self.peer_met = opening.source is None
        self.takes_over = opening.source is None  # blocks of its source, unless it hears otherwise
        self.known_at: int | None = None  # the pull number current at the first real answer
        self._heard = False  # a real answer in this life: the shape is what the source has, too
        self._number = 0
        self._acked = -1
        self._take_parts()
        self._shows_layout = False
        self._resend_at_s = now_s  # a pull is due at once
        self._resend_s = timing.resend_s
        self._pulled_at_s = now_s

    def _take_parts(self) -> None:
        """The payload comes in the parts of ``shape``; all have what is counted as sent."""
        parts = len(self.shape.ranks)
        self._committed = [ExtentSet() for _ in range(parts)]
        self._claims = Claims(self.opening.chunk_tokens, parts)
        if self.sent_tokens > self.opening.start_tokens:
            for part in self._committed:
                part.add(self.opening.start_tokens, self.sent_tokens)

    @property
    def chunks_under_way(self) -> int:
        """Claimed, and not in place yet: somebody may write into its blocks."""
        return len(self._claims)

    # --- asking ---

    def _edge_to_fetch(self) -> int:
        """What the source has, in whole blocks of the wire.

        One of ours may be larger than all that the source has room for, so it is filled bit by bit.
        """
        available = self.available_tokens
        if available != self.total_tokens:
            available -= available % self.shape.wire_block_tokens
        return min(available, self.target_tokens)

    def _claim(self) -> bool:
        """Claim what the window has room for and the source has; say whether it was pulled."""
        if not self.peer_up or not self._claims.has_stream or not self._heard:
            return False
        limit = min(self.window.edge_tokens, self._edge_to_fetch())
        fresh = []
        for part, rank in enumerate(self.shape.ranks):
            for key, want in self._claims.make(self.sent_tokens, limit, part):
                place = self.window.cover(want.first_token, want.tokens, rank)
                self._emit(ev.Claim(key, want.first_token, want.tokens, place, part))
                fresh.append(want)
        if fresh:
            self._resend_s = self.timing.resend_s
            self._pull(tuple(fresh))
            self._repeat_later()
        return bool(fresh)

    def _pull_if_due(self) -> None:
        again = self.now_s >= self._resend_at_s
        if not again and not self._ack_is_due():
            return
        self._pull(self._claims.wants if again else ())
        if again:
            self._repeat_later()
        else:  # an ack tells nothing of the claims: their repeat is not put off
            self._resend_at_s = min(self._resend_at_s, self.now_s + self._resend_s)

    def _ack_is_due(self) -> bool:
        news = self.sent_tokens - max(self._acked, self.opening.start_tokens)
        step = max(1, self.opening.window_tokens // ACK_PARTS)
        return self.known_at is not None and (news >= step or (news > 0 and not self._claims))

    def _pull(self, want: tuple[Want, ...]) -> None:
        self._number += 1
        self._acked = self.sent_tokens
        self._pulled_at_s = self.now_s
        self._emit(ev.SendPull(self._number, self.sent_tokens, want, self._shows_layout))

    def _repeat_later(self) -> None:
        self._resend_at_s = self.now_s + self._resend_s
        self._resend_s = min(self._resend_s * 2, self.timing.resend_max_s)

    # --- moves ---

    def _on_peer_up(self, _event: ev.PeerUp) -> None:
        self.peer_up = self.peer_met = True
        self._resend_soon()

    def _on_news_lost(self, _event: ev.NewsLost) -> None:
        self._resend_soon()

    def _on_peer_down(self, _event: ev.PeerDown) -> None:
        self.peer_up = False

    def _on_stream_up(self, event: ev.StreamUp) -> None:
        self._claims.stream_up(event.key)

    def _on_stream_down(self, event: ev.StreamDown) -> None:
        """A claim is bound to its connection, so it ends here and may be made anew elsewhere."""
        self._claims.stream_down(event.key)

    def _on_shaped(self, event: ev.Shaped) -> None:
        """It may come again: a source that was started anew does not know our layout any more."""
        if event.shape != self.shape:
            if self._claims:
                self._fail(Code.LAYOUT_MISMATCH, "the source's layout or ranks have changed")
                return
            streams = self._claims.streams
            self.shape = event.shape
            self._take_parts()
            for key in streams:
                self._claims.stream_up(key)
        self._shows_layout = True
        self._resend_at_s = self.now_s

    def _on_copied(self, event: ev.Copied) -> None:
        """The two have met; said again it changes nothing."""
        if not self.takes_over:
            return
        self.takes_over = False
        self.shape = event.shape
        self._take_parts()
        self._claims.stream_up(event.key)

    def _on_missed(self, event: ev.Missed) -> None:
        self._claims.drop(event.key, event.first_token, event.part)

    def _on_received(self, event: ev.Received) -> None:
        tokens = self._claims.fulfil(event.key, event.first_token, event.part)
        assert tokens is not None, event  # I4: the transport posts only what it found claimed
        self._committed[event.part].add(event.first_token, event.first_token + tokens)
        self._committed_more()

    def _committed_more(self) -> None:
        """Progress is what every part has without a gap."""
        ends = [part.prefix_end(self.sent_tokens) for part in self._committed]
        self.sent_tokens = min(ends)
        self._progressed()

    def _on_heard(self, event: ev.Heard) -> None:
        news = event.progress
        if news.number > self._number:
            return  # an answer to a pull that was never sent
        if not news.known:
            if self.known_at is not None and news.number > self.known_at:
                self._fail(Code.SOURCE_LOST, "the source daemon no longer knows this attempt")
            elif news.number == self._number:
                if news.will_tell:
                    self._rest()
                else:  # not, or no longer
                    soon_s = self.now_s + self.timing.resend_max_s
                    self._resend_at_s = min(self._resend_at_s, soon_s)
            return
        self._shows_layout = False
        self._heard = True
        if self.known_at is None:
            self.known_at = self._number
            self._progressed()
        wrong = what_is_wrong(self, news)
        if wrong is not None:
            self._fail(*wrong)
            return
        told = self.total_tokens is None and news.total_tokens is not None
        if told or news.available_tokens > self.available_tokens:
            self._progressed()
        if news.number == self._number and not self._claims:
            self._rest()
        self.available_tokens = max(self.available_tokens, news.available_tokens)
        self.total_tokens = news.total_tokens if self.total_tokens is None else self.total_tokens
        self.aux = news.aux if self.aux is None else self.aux

    def _rest(self) -> None:
        """Nothing is under way, and the source tells what is new by itself."""
        self._resend_s = self.timing.resend_s
        self._resend_at_s = self._pulled_at_s + self.timing.lease_s

    def _resend_soon(self) -> None:
        self._resend_s = self.timing.resend_s
        self._resend_at_s = min(self._resend_at_s, self.now_s + self._resend_s)
        if not self._heard:
            self._resend_at_s = self.now_s
