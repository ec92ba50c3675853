"""The command that works a window and a pool out from a model's config: it needs no daemon."""

from pathlib import Path

import click

from kvferry_daemon.output import Exit, as_json, stop, write
from kvferry_daemon.sizing import Cache, ModelRefused, Plan, cache_of, plan, read_model
from kvferry_proto.layout import Dtype

POSITIVE = click.FloatRange(min=0, min_open=True, max=1e5)
MIB, GIB = 1 << 20, 1 << 30


@click.command()
@click.option(
    "--model",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    required=True,
    help="its config.json, as Hugging Face has it",
)
@click.option("--link-gbit", type=POSITIVE, default=100.0, show_default=True, help="Gbit/s of it")
@click.option(
    "--concurrent",
    type=click.IntRange(1, 20_000),
    default=16,
    show_default=True,
    help="transfers that are to move at once",
)
@click.option(
    "--ranks",
    type=click.IntRange(1, 64),
    default=1,
    show_default=True,
    help="tensor-parallel workers at this daemon",
)
@click.option(
    "--dtype",
    type=click.Choice([one.value for one in Dtype]),  # of an enum it takes the members' names
    metavar="DTYPE",  # all of them are too long a word for a page
    help="the cache's, such as bfloat16 or float8_e4m3fn [default: the model's]",
)
@click.option(
    "--resume-ms",
    type=POSITIVE,
    default=50.0,
    show_default=True,
    help="from a token's arrival to the worker's resume behind it",
)
@click.option("--json", "json_wanted", is_flag=True, help="one JSON object")
def size(
    model: Path,
    link_gbit: float,
    concurrent: int,
    ranks: int,
    dtype: str | None,
    resume_ms: float,
    json_wanted: bool,
) -> None:
    """Work out bytes per token, window and pool for a model and a link."""
    try:
        cache = cache_of(read_model(model), ranks, Dtype(dtype) if dtype else None)
    except ModelRefused as error:
        stop(Exit.USAGE, f"size: {error}")
    found = plan(
        cache, link_gbit=link_gbit, concurrent=concurrent, ranks=ranks, resume_ms=resume_ms
    )
    if json_wanted:
        write(as_json("size", {"cache": cache._asdict(), "plan": found._asdict()}))
    else:
        write(_words(cache, found, link_gbit, concurrent))


def _words(cache: Cache, found: Plan, link_gbit: float, concurrent: int) -> str:
    """What was found, and the settings as a config file has them."""
    kept = "one latent" if cache.is_latent else f"{cache.heads} KV heads"
    token = f"{found.token_bytes:,} bytes a token in all ranks"
    block = f"a block of {found.block_bytes / MIB:.2f} MiB in each rank"
    pool = f"{concurrent} windows for sending and {concurrent} for receiving"
    lines = [
        f"cache   {token}; in each {cache.layers} layers of {kept}, {cache.dtype}",
        f"link    {link_gbit:g} Gbit/s bring {found.tokens_per_s:,} tokens/s",
        f"window  {found.window_bytes / GIB:.2f} GiB; {block}",
        f"pool    {pool}, {found.role_bytes / GIB:.2f} GiB each",
    ]
    if cache.sliding_layers:
        lines.append(
            f"note    {cache.sliding_layers} layers slide: blocks have room for all their tokens"
        )
    settings = f"window_tokens = {found.window_tokens}\nbudget_bytes = {found.budget_bytes}"
    return "\n".join([*lines, "", settings])
