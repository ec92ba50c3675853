"""The same model and prompt in one process, for comparison."""

from kvferry_client.demo import llama, roles


def main() -> None:
    """Prefill and generate without ever taking the cache out."""
    args = roles.parse()
    model = llama.build_model(roles.SEED)
    ids = llama.prompt(args.tokens, roles.SEED)
    tokens = llama.reference(model, ids, roles.PIECE_TOKENS, roles.NEW_TOKENS)
    roles.say("end", output_tokens=tokens)


if __name__ == "__main__":
    roles.run(main)
