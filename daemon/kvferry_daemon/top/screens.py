"""What opens above the live view: the story of a transfer, and the question before an abort."""

from typing import ClassVar

from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Footer, Static


class StoryScreen(ModalScreen[None]):
    """Text that scrolls."""

    CSS = "StoryScreen VerticalScroll { background: $surface; }"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,q,e", "app.pop_screen", "Back"),
    ]

    def __init__(self, story: Text) -> None:
        super().__init__()
        self._story = story

    def compose(self) -> ComposeResult:
        yield VerticalScroll(Static(self._story, id="story"))
        yield Footer()


class AbortScreen(ModalScreen[bool]):
    """Asks once more: an abort cannot be taken back."""

    CSS = """
    AbortScreen { align: center middle; }
    AbortScreen Static { width: auto; max-width: 90%; height: auto; padding: 1 2;
        background: $surface; border: heavy $error; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("y", "answer(True)", "Abort it"),
        Binding("n,escape,q", "answer(False)", "Leave it"),
    ]

    def __init__(self, question: Text) -> None:
        super().__init__()
        self._question = question

    def compose(self) -> ComposeResult:
        yield Static(self._question, id="question")
        yield Footer()

    def action_answer(self, sure: bool) -> None:
        self.dismiss(sure)
