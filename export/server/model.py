"""The model "dtpm" of an NVIDIA Triton Inference Server: photos of any size in, restored photos out.

Pads, draws the noise, asks the model "dtpm_network" and crops. Runs in the server's Python backend with numpy alone.
"""

import json
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils  # type: ignore[import-not-found]


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        parameters = json.loads(args["model_config"])["parameters"]
        self.multiple = int(parameters["multiple"]["string_value"])
        self.noise_fields = int(parameters["noise_fields"]["string_value"])

    def execute(self, requests: list[Any]) -> list[Any]:
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        photo = pb_utils.get_input_tensor_by_name(request, "photo").as_numpy()
        seed = pb_utils.get_input_tensor_by_name(request, "seed")
        if photo.ndim != 3 or photo.shape[2] != 3 or photo.size == 0:
            return _failed(f"photo must be height x width x 3 and not empty, got {photo.shape}")
        height, width, _ = photo.shape
        pad = [(0, -side % self.multiple) for side in (height, width)]
        padded = photo
        for axis, amount in enumerate(pad):
            around = [(0, 0)] * 3
            around[axis] = amount
            padded = np.pad(padded, around, mode="reflect" if photo.shape[axis] > 1 else "edge")
        image = np.ascontiguousarray(padded.transpose(2, 0, 1)[None], dtype=np.float32) / 127.5 - 1
        number = 0 if seed is None else int(seed.as_numpy().reshape(-1)[0])
        generator = np.random.default_rng(number % 2**64)  # which takes no negative one
        noise = generator.standard_normal((self.noise_fields, *image.shape[1:]), np.float32)
        answer = pb_utils.InferenceRequest(
            model_name="dtpm_network",
            requested_output_names=["restored"],
            inputs=[pb_utils.Tensor("image", image), pb_utils.Tensor("noise", noise)],
            preferred_memory=pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU, 0),
        ).exec()
        if answer.has_error():
            return _failed(answer.error().message())
        restored = pb_utils.get_output_tensor_by_name(answer, "restored").as_numpy()
        restored = restored[0, :, :height, :width].transpose(1, 2, 0)
        restored = np.ascontiguousarray(np.rint(restored * 127.5 + 127.5).astype(np.uint8))
        return pb_utils.InferenceResponse(output_tensors=[pb_utils.Tensor("restored", restored)])


def _failed(why: str) -> Any:
    return pb_utils.InferenceResponse(output_tensors=[], error=pb_utils.TritonError(why))
