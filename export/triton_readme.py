"""What lies beside the models of a Triton model repository: how to start it, and how to ask it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from string import Template
from typing import TYPE_CHECKING

from lightning_ft.export.extras import require
from lightning_ft.export.triton_sources import sample

if TYPE_CHECKING:
    from lightning_ft.export.triton_config import Service
    from lightning_ft.export.triton_sources import Source

IMAGE = "nvcr.io/nvidia/tritonserver:25.06-py3"

DOCKERFILE = Template("""\
# docker build -t triton-texts .
FROM $image
RUN pip install --no-cache-dir tokenizers==$tokenizers
COPY . /models
EXPOSE 8000 8001 8002
HEALTHCHECK --interval=10s --timeout=3s --start-period=120s CMD curl --fail --silent localhost:8000/v2/health/ready
ENTRYPOINT ["python3", "/models/serve.py"]
""")

README = Template("""\
# A Triton model repository

$models

## Start

    docker build -t triton-texts .
    docker run --rm$options --shm-size=1g -p 8000:8000 -p 8001:8001 -p 8002:8002 triton-texts

The image of the Dockerfile is NVIDIA's, with `tokenizers` added. Without a container: `python3 serve.py`, with
tritonserver on the PATH and numpy and tokenizers in the Python of its Python backend. The server is ready, with all
models, when `curl --fail localhost:8000/v2/health/ready` succeeds.

Stop it with SIGTERM (`docker stop --time 90`): `serve.py` takes no more after two seconds, lets the models answer what
they have accepted, and ends the server. `tritonserver --model-repository=.` works, too, but answers what waits at that
moment with an error (HTTP 503, gRPC UNAVAILABLE): once told to stop, Triton refuses what one model asks of another.
$engines
## Ask

    curl localhost:8000/v2/models/$name/infer -H 'Content-Type: application/json' \\
      -d '$body'

From Python, with `pip install "tritonclient[http]"`:

    import json
    import numpy as np
    import tritonclient.http as triton

    client = triton.InferenceServerClient("localhost:8000")
    rows = np.array([[$value]], np.object_)  # [rows, 1]
    given = triton.InferInput("$field", rows.shape, "BYTES")
    given.set_data_from_numpy(rows)
    for answer in client.infer("$name", [given]).as_numpy("answer").reshape(-1):
        print(json.loads(answer))

A request has 1 to $max_batch_size rows. `answer` is JSON, the same as `predictor.py` writes; the other outputs are its
main fields: ask only for those that you read.$note A row that cannot be read makes its request an error (HTTP 400, gRPC
INVALID_ARGUMENT), and no other.

## How requests are merged

Triton's dynamic batcher merges requests for `$name` whatever the length of their texts; while the model is free, the
first waits $delay microseconds for others. The model tokenises them, sorts all rows by length, pads $rows at a time and
asks `$graph`. Requests of token ids for `$graph` itself are merged only where their shapes are equal: its backend
cannot pad, and `allow_ragged_batch` would join them in one flat tensor that the graph does not read.

No queue has a time-out: it would refuse requests that only wait while a batch runs.

`parameters` in `$name/config.pbtxt` may be changed: `max_bytes` of a text ($max_bytes), `max_length` in tokens,
`batch_size` (rows that go through the graph at once). `instance_group` in `$graph/config.pbtxt` says how often the
graph is loaded ($instances). On a CPU each instance takes all cores, unless a line there says how many:

    parameters { key: "intra_op_thread_count" value { string_value: "4" } }
""")


def dockerfile() -> str:
    """Triton with what the step from texts to answers imports."""
    return DOCKERFILE.substitute(image=IMAGE, tokenizers=require("tokenizers").__version__)


def readme(pairs: Sequence[tuple[Service, Source]], texts: Mapping[str, Sequence[str]]) -> str:
    """README.md of a repository.

    Args:
        pairs: The services with what they were made from. How to ask is said of the first.
        texts: Inputs by task, of tasks whose rows are texts.
    """
    service, source = pairs[0]
    field = texts.get(source.head["task"], ("row",))[0]
    value = _example(source, as_json=field == "row")
    body = {"inputs": [{"name": field, "datatype": "BYTES", "shape": [1, 1], "data": [value]}]}
    return README.substitute(
        models="\n".join(_models(*pair) for pair in pairs),
        options=" --gpus all" if service.device == "gpu" else "",
        engines=_engines(service, source),
        name=service.name,
        graph=service.graph,
        field=field,
        value=repr(value.encode()),
        body=json.dumps(body),
        note="" if field != "row" else " A row is JSON, as a line of the file that `predictor.py` reads.",
        max_batch_size=service.max_batch_size,
        delay=service.max_queue_delay_us,
        rows=service.rows,
        max_bytes=f"{service.max_bytes:,}",
        instances=service.instances,
    )


def _models(service: Service, source: Source) -> str:
    return (
        f"- `{service.name}` ({source.head['task']}): texts in, answers out.\n"
        f"- `{service.graph}`: token ids in, {', '.join(spec.name for spec in source.outputs)} out, by "
        f"{service.backend} on the {service.device.upper()}."
    )


def _example(source: Source, *, as_json: bool) -> str:
    """A row that the model reads."""
    sampled = sample(source, source.longest or 128, "It is good.")
    row = "A text." if sampled is None else sampled[0]
    return json.dumps(row) if as_json else str(row)


def _engines(service: Service, source: Source) -> str:
    if source.engine is not None:
        return f"\nThe engine needs {source.engine.needs}: take the image of the release that has this version.\n"
    if service.engine_cache is None:
        return ""
    return (
        "\nThe first start builds TensorRT engines, which takes minutes. They are kept in "
        f"{service.engine_cache}: mount a volume there, `-v engines:{service.engine_cache}`.\n"
    )
