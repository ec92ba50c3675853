"""The demo's encode process: embeddings leave while later images are still being encoded."""

from kvferry_client.demo import multimodal, roles

AUX = ("total_length", "position_delta")


def main() -> None:
    """Encode a prompt with images in pieces and send each as soon as it exists."""
    args = roles.parse()
    model = multimodal.build_model(roles.SEED)
    prompt = multimodal.prompt(args.tokens, roles.SEED)
    layout = roles.layout_of(multimodal.planes(model), AUX)
    pieces = multimodal.encode_in_pieces(model, prompt, roles.PIECE_TOKENS)
    roles.send(args, layout, ((p.first_token, p.arrays, p.aux) for p in pieces))


if __name__ == "__main__":
    roles.run(main)
