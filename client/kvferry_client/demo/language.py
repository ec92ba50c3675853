"""The demo's language process: runs on the embeddings that arrived."""

from kvferry_client.demo import multimodal, roles
from kvferry_client.demo.encode import AUX


def main() -> None:
    """Receive the embeddings window by window, then generate."""
    args = roles.parse()
    model = multimodal.build_model(roles.SEED)
    layout = roles.layout_of(multimodal.planes(model), AUX)
    arrays, report, receiving = roles.receive(args, layout)
    aux = receiving.aux or {}
    assert aux["total_length"] == report["total_tokens"], (aux, report)
    tokens = multimodal.generate(model, arrays, int(aux["position_delta"]), roles.NEW_TOKENS)
    roles.say("end", output_tokens=tokens, **report)


if __name__ == "__main__":
    roles.run(main)
