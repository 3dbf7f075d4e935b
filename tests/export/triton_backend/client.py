"""What runs in the environment of the Triton tests: `validate REPOSITORY…`, or `ask PROTOCOL URL` with JSON on stdin.

`ask` reads `{"model", "requests", "outputs"}`, where a request is columns of texts in hexadecimal (a text may be no
UTF-8) by the input's name. All requests are sent before any answer is awaited.
"""

import json
import sys
from pathlib import Path


def validate(*repositories):
    """Configurations as Triton's own protobuf reads them, by model."""
    from google.protobuf import json_format, text_format
    from tritonclient.grpc import model_config_pb2

    found = {}
    for path in (path for folder in repositories for path in Path(folder).glob("*/config.pbtxt")):
        message = text_format.Parse(path.read_text(encoding="utf-8"), model_config_pb2.ModelConfig())
        found[path.parent.name] = json_format.MessageToDict(message, preserving_proto_field_name=True)
    return found


def ask(protocol, url):
    """Of each request its outputs by name, or its error."""
    import numpy as np
    import tritonclient.grpc
    import tritonclient.http

    asked = json.load(sys.stdin)
    triton = getattr(tritonclient, protocol)

    def inputs(columns):
        for name, texts in columns.items():
            values = np.array([[bytes.fromhex(text)] for text in texts], np.object_)
            tensor = triton.InferInput(name, values.shape, "BYTES")
            tensor.set_data_from_numpy(values)
            yield tensor

    outputs = [triton.InferRequestedOutput(name) for name in asked["outputs"]]
    given = [list(inputs(columns)) for columns in asked["requests"]]
    send = _http if protocol == "http" else _grpc
    return [_read(result, asked["outputs"]) for result in send(triton, url, asked["model"], given, outputs)]


def _http(triton, url, model, given, outputs):
    from tritonclient.utils import InferenceServerException

    with triton.InferenceServerClient(url, concurrency=max(1, len(given)), network_timeout=120) as client:
        sent = [client.async_infer(model, tensors, outputs=outputs) for tensors in given]
        for request in sent:
            try:
                yield request.get_result()
            except InferenceServerException as error:
                yield error


def _grpc(triton, url, model, given, outputs):
    import queue

    answers = [queue.Queue() for _ in given]
    with triton.InferenceServerClient(url) as client:
        for tensors, answer in zip(given, answers, strict=True):
            client.async_infer(
                model, tensors, lambda result, error, to=answer: to.put(error or result), outputs=outputs
            )
        yield from (answer.get(timeout=120) for answer in answers)


def _read(result, names):
    if isinstance(result, Exception):
        return {"error": result.message(), "status": result.status()}
    values = {name: result.as_numpy(name) for name in names}
    return {
        name: [v.decode() for v in value.reshape(-1)] if value.dtype == object else value.tolist()
        for name, value in values.items()
    }


if __name__ == "__main__":
    command, *arguments = sys.argv[1:]
    print(json.dumps({"validate": validate, "ask": ask}[command](*arguments)))
