"""What SGLang sends beside its cache: rows of buffers, as they lie in memory. Without SGLang."""

import pytest
import torch

from kvferry_client.sglang_aux import aux_values, take_aux


def buffers(width: int = 3) -> dict[str, torch.Tensor]:
    """Of two requests."""
    return {
        "tokens": torch.arange(2 * 4, dtype=torch.int32).reshape(2, 4),
        "logprobs": torch.arange(2 * width, dtype=torch.float32).reshape(2, width),
    }


def test_a_row_comes_out_as_it_went_in() -> None:
    here = {name: torch.zeros_like(rows) for name, rows in buffers().items()}
    take_aux(here, 0, aux_values(buffers(), 1))
    for name, rows in buffers().items():
        assert torch.equal(here[name][0], rows[1])
        assert not here[name][1].any()


@pytest.mark.parametrize("came", [2, 4])
def test_a_row_of_another_length_is_refused_before_anything_is_written(came: int) -> None:
    """It comes from another engine, which may be set otherwise; no scheduler dies of that."""
    here = {name: torch.zeros_like(rows) for name, rows in buffers().items()}
    with pytest.raises(ValueError, match=rf"logprobs has {4 * came} bytes .* 12"):
        take_aux(here, 0, aux_values(buffers(came), 1))
    assert not any(rows.any() for rows in here.values())


@pytest.mark.parametrize("wrong", [None, 7, "x" * 12])
def test_what_is_no_row_is_refused(wrong: object) -> None:
    here = buffers()
    values = aux_values(buffers(), 1)
    if wrong is None:
        del values["logprobs"]
    else:
        values["logprobs"] = wrong  # type: ignore[assignment]
    with pytest.raises(ValueError, match="logprobs"):
        take_aux(here, 0, values)
