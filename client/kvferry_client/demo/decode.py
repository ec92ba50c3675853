"""The demo's decode process: goes on from the cache that arrived."""

from kvferry_client.demo import llama, roles
from kvferry_client.transformers_cache import layout_of


def main() -> None:
    """Receive the cache window by window, then generate."""
    args = roles.parse()
    model = llama.build_model(roles.SEED)
    layout = layout_of(model.config, block_size_tokens=roles.BLOCK_TOKENS, aux=("first_token",))
    arrays, report, receiving = roles.receive(args, layout)
    first_token = int((receiving.aux or {})["first_token"])
    tokens = llama.decode(model, arrays, first_token, roles.NEW_TOKENS)
    roles.say("end", output_tokens=tokens, **report)


if __name__ == "__main__":
    roles.run(main)
