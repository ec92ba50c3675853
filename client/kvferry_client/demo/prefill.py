"""The demo's prefill process: the KV cache leaves while the prompt is still being read."""

from kvferry_client.demo import llama, roles
from kvferry_client.transformers_cache import layout_of


def main() -> None:
    """Prefill a prompt in pieces and send each as soon as it exists."""
    args = roles.parse()
    model = llama.build_model(roles.SEED)
    ids = llama.prompt(args.tokens, roles.SEED)
    layout = layout_of(model.config, block_size_tokens=roles.BLOCK_TOKENS, aux=("first_token",))
    pieces = llama.prefill_in_pieces(model, layout, ids, roles.PIECE_TOKENS)
    roles.send(
        args,
        layout,
        (
            (
                p.first_token,
                p.arrays,
                None if p.next_token is None else {"first_token": p.next_token},
            )
            for p in pieces
        ),
    )


if __name__ == "__main__":
    roles.run(main)
