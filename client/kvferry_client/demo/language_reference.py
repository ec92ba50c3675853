"""The same multimodal model and prompt in one process, for comparison."""

from kvferry_client.demo import multimodal, roles


def main() -> None:
    """Let transformers do it all by itself."""
    args = roles.parse()
    model = multimodal.build_model(roles.SEED)
    prompt = multimodal.prompt(args.tokens, roles.SEED)
    roles.say("end", output_tokens=multimodal.reference(model, prompt, roles.NEW_TOKENS))


if __name__ == "__main__":
    roles.run(main)
