"""Ask a Triton server that runs a repository of `lightning-ft export … --to triton`.

pip install "tritonclient[http]"
python examples/triton_client.py localhost:8000 model "A moving film." "Two hours of my life."
"""

import argparse

import numpy as np
import tritonclient.http as triton


def main() -> None:
    parser = argparse.ArgumentParser(description="Label texts with a text classifier in Triton.")
    parser.add_argument("url", help="host:port of the server's HTTP service")
    parser.add_argument("model", help="the model that takes texts")
    parser.add_argument("texts", nargs="+")
    chosen = parser.parse_args()
    outputs = [triton.InferRequestedOutput(name) for name in ("label", "score")]
    with triton.InferenceServerClient(chosen.url, concurrency=len(chosen.texts)) as client:
        # A request for each text: the server merges them. They are all sent before the first is awaited.
        sent = []
        for text in chosen.texts:
            rows = np.array([[text.encode()]], np.object_)  # [rows, 1]
            given = triton.InferInput("text", rows.shape, "BYTES")
            given.set_data_from_numpy(rows)
            sent.append(client.async_infer(chosen.model, [given], outputs=outputs))
        for text, request in zip(chosen.texts, sent, strict=True):
            result = request.get_result()
            print(result.as_numpy("label")[0, 0].decode(), f"{result.as_numpy('score')[0, 0]:.3f}", text, sep="\t")


if __name__ == "__main__":
    main()
