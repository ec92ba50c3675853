"""`kvferry top`: pools, peers, transfers and rates on a whole terminal, looked at once a second."""

import time
from pathlib import Path
from typing import ClassVar

from rich.text import Text
from textual import work
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.coordinate import Coordinate
from textual.widgets import DataTable, Footer, Input, Static

from kvferry_daemon.operator import ask
from kvferry_daemon.plain import plain
from kvferry_daemon.story import story
from kvferry_daemon.top import views
from kvferry_daemon.top.rates import Rates, Side, side_of
from kvferry_daemon.top.screens import AbortScreen, StoryScreen
from kvferry_proto import control
from kvferry_proto.control import Sort, Status, Transfers, TransferStatus
from kvferry_proto.errors import FerryError

EVERY_S = 1.0
SORTS: tuple[Sort, ...] = ("idle", "age", "sent", "blocks", "opened")
REASON = "given up in kvferry top"


class Top(App[None]):
    """One terminal that watches one daemon."""

    TITLE = "kvferry top"
    ENABLE_COMMAND_PALETTE = False
    CSS = """
    #head, #pools, #peers, #order { height: auto; padding: 0 1; }
    #pools, #peers { border-top: solid $foreground 20%; }
    #order { background: $boost; }
    .old { text-opacity: 50%; }
    #transfers { height: 1fr; }
    #filter { display: none; }
    #filter.asked { display: block; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("s", "sort", "Sort"),
        Binding("f,slash", "filter", "Filter"),
        Binding("escape", "no_filter", "No filter", show=False),
        Binding("e", "explain", "Explain"),
        Binding("a", "abort", "Abort"),
        Binding("q", "quit", "Quit"),
    ]

    def __init__(self, runtime_dir: Path) -> None:
        super().__init__()
        self._runtime_dir = runtime_dir
        self._rates = Rates()
        self._sort: Sort = SORTS[0]
        self._words = ""  # that a transfer must have
        self._answer: Transfers | None = None
        self._is_old = False
        self._shown: list[TransferStatus] = []

    def compose(self) -> ComposeResult:
        yield Static(id="head")
        yield Static(id="pools")
        yield Static(id="peers")
        yield Static(id="order")
        yield DataTable[Text](id="transfers", cursor_type="row")
        yield Input(id="filter", placeholder="words of an id, worker, state, wait or address")
        yield Footer()

    def on_mount(self) -> None:
        self._table.add_columns(*views.COLUMNS)
        self._table.focus()
        self.look()
        self.set_interval(EVERY_S, self.look)

    @property
    def _table(self) -> DataTable[Text]:
        return self.query_one("#transfers", DataTable)

    def _put(self, name: str, text: Text) -> None:
        self.query_one(name, Static).update(text)

    # --- looking: a daemon that stands still answers late, and the keys must not wait for it ---

    @work(thread=True, exclusive=True, group="look")
    def look(self) -> None:
        """Ask once, off the loop."""
        try:
            status = ask(self._runtime_dir, control.GetStatus())
            rows = ask(self._runtime_dir, control.GetTransfers(sort=self._sort))
        except FerryError as error:
            self.call_from_thread(self._tell_of, error)
            return
        self.call_from_thread(self._take, status, rows, time.monotonic())

    def _tell_of(self, error: FerryError) -> None:
        self._put("#head", Text(f"{plain(str(error))}\nlooking again every second", "bold red"))
        self._mark_old(True)
        self._fill()

    def _mark_old(self, old: bool) -> None:
        """What the last answer told is shown on, and is not taken for what is now."""
        self._is_old = old
        for name in ("#pools", "#peers", "#order", "#transfers"):
            self.query_one(name).set_class(old, "old")

    def _take(self, status: Status, answer: Transfers, at_s: float) -> None:
        self._mark_old(False)
        self._rates.look(at_s, status, answer.transfers)
        self._answer = answer
        self._put("#head", views.head(status, self._rates))
        self._put("#pools", views.pools(status))
        self._put("#peers", views.peers(status))
        self._fill()

    def _fill(self) -> None:
        """Show the rows that fit, with what is most of the order on top and the cursor in place."""
        if self._answer is None:
            return
        table, marked = self._table, self._marked
        rows = reversed(self._answer.transfers)
        self._shown = [row for row in rows if views.fits(row, self._words)]
        more = f"; {self._answer.more} more are not looked at" if self._answer.more else ""
        words = f"; with {self._words!r}" if self._words else ""
        all_ = len(self._answer.transfers)
        order = "as it was when the daemon answered last: " if self._is_old else ""
        order += f"{len(self._shown)} of {all_} transfers, most {self._sort} first{words}{more}"
        self._put("#order", Text(plain(order)))
        scroll_y = table.scroll_y
        table.clear()
        for row in self._shown:
            table.add_row(*views.cells(row, self._rates))
        sides = [side_of(row) for row in self._shown]
        if marked in sides:
            table.cursor_coordinate = Coordinate(sides.index(marked), 0)
        table.scroll_to(y=scroll_y, animate=False)

    @property
    def _marked(self) -> Side | None:
        row = self._marked_row
        return None if row is None else side_of(row)

    @property
    def _marked_row(self) -> TransferStatus | None:
        number = self._table.cursor_row
        return self._shown[number] if 0 <= number < len(self._shown) else None

    # --- keys ---

    def action_sort(self) -> None:
        """The next order."""
        self._sort = SORTS[(SORTS.index(self._sort) + 1) % len(SORTS)]
        self.look()

    def action_filter(self) -> None:
        """Let words be typed."""
        asked = self.query_one("#filter", Input)
        asked.add_class("asked")
        asked.focus()

    def action_no_filter(self) -> None:
        """All transfers again."""
        self.query_one("#filter", Input).value = ""
        self._close_filter()

    def on_input_changed(self, event: Input.Changed) -> None:
        self._words = event.value.strip()
        self._fill()

    def on_input_submitted(self, _event: Input.Submitted) -> None:
        self._close_filter()

    def _close_filter(self) -> None:
        self.query_one("#filter", Input).remove_class("asked")
        self._table.focus()

    def on_data_table_row_selected(self, _event: DataTable.RowSelected) -> None:
        self.action_explain()

    def action_explain(self) -> None:
        """The story of the marked transfer."""
        if (marked := self._marked) is not None:
            self._explain(marked)

    @work(thread=True, group="explain")
    def _explain(self, side: Side) -> None:
        try:
            answer = ask(self._runtime_dir, control.Explain(transfer_id=side.transfer_id))
        except FerryError as error:
            self.call_from_thread(self._say, str(error))
            return
        told = story(answer) if answer.transfers else f"{plain(side.transfer_id)} is forgotten"
        self.call_from_thread(self.push_screen, StoryScreen(Text.from_ansi(told)))

    def action_abort(self) -> None:
        """Give the marked transfer up, once that is said twice."""
        row = self._marked_row
        if row is None:
            return
        side = side_of(row)
        if row.ended:
            self._say(f"{side.transfer_id}, attempt {side.attempt}, has ended already")
            return
        question = plain(f"Abort {side.transfer_id}, attempt {side.attempt}?") + "  (y/n)"

        def answered(sure: bool | None) -> None:
            if sure:
                self._abort(side)

        self.push_screen(AbortScreen(Text(question)), answered)

    @work(thread=True, group="abort")
    def _abort(self, side: Side) -> None:
        request = control.AbortTransfer(
            transfer_id=side.transfer_id, attempt=side.attempt, reason=REASON
        )
        try:
            ask(self._runtime_dir, request)
        except FerryError as error:
            self.call_from_thread(self._say, str(error))
            return
        self.call_from_thread(self._say, f"{side.transfer_id}, attempt {side.attempt}, is aborted")
        self.call_from_thread(self.look)

    def _say(self, words: str) -> None:
        self.notify(plain(words), markup=False)
