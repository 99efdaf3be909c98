"""Prompts are encoded once, the tensors are the pipeline's own, and encoders rest where they should."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pipeline import conditioning
from pipeline.conditioning import Conditioning
from pipeline.embedded.build import build_pipeline
from pipeline.tasks.maze import MazeTask
from pipeline.tasks.task import Sampler


class Encoder(torch.nn.Module):
    """An encoder that notes where it was sent."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[str] = []

    def to(self, device: Any) -> Encoder:  # type: ignore[override]
        self.sent.append(str(device))
        return self


class Pipe:
    """A pipeline that encodes a prompt as its length and a number that grows with each call."""

    def __init__(self, device: str = "cpu") -> None:
        self.device = torch.device(device)
        self.text_encoder, self.text_encoder_2, self.vae = Encoder(), Encoder(), Encoder()
        self.components = {"vae": self.vae, "text_encoder": self.text_encoder, "text_encoder_2": self.text_encoder_2}
        self.calls: list[Any] = []

    def encode_prompt(self, prompt: Any = None, **kwargs: Any) -> torch.Tensor:
        self.calls.append((prompt, kwargs, list(self.text_encoder.sent)))
        if kwargs.get("fails"):
            raise RuntimeError("planted")
        return torch.tensor([float(len(self.calls))])


class TestOnce:
    def test_equal_calls_are_one(self):
        pipe = Pipe()
        Conditioning(pipe)
        first = pipe.encode_prompt(["red", "blue"], do_classifier_free_guidance=False)
        assert pipe.encode_prompt(["red", "blue"], do_classifier_free_guidance=False) is first
        assert len(pipe.calls) == 1

    @pytest.mark.parametrize(
        "other",
        [
            {"prompt": ["blue", "red"]},
            {"prompt": ["red,blue"]},
            {"prompt": ["red", "blue"], "max_sequence_length": 8},
            {"prompt": ["red", "blue"], "dtype": torch.float16},
            {"prompt": ["red", "blue"], "negative_prompt": ""},
        ],
        ids=["order", "one-text", "length", "precision", "negative"],
    )
    def test_other_calls_are_others(self, other):
        pipe = Pipe()
        Conditioning(pipe)
        first = pipe.encode_prompt(prompt=["red", "blue"])
        assert pipe.encode_prompt(**other) is not first
        assert len(pipe.calls) == 2

    def test_calls_with_tensors_are_passed_on(self):
        """The pipeline arranges embeddings that it was given, whose text would not tell them apart."""
        pipe = Pipe()
        Conditioning(pipe)
        for _ in range(2):
            pipe.encode_prompt(prompt=None, prompt_embeds=torch.zeros(2, 3))
            pipe.encode_prompt(prompt="red", mask=torch.zeros(2, 3))
        assert len(pipe.calls) == 4

    def test_only_the_latest_are_kept(self, monkeypatch):
        monkeypatch.setattr(conditioning, "KEPT", 2)
        pipe = Pipe()
        Conditioning(pipe)
        for prompt in ("a", "b", "a", "c", "a", "b"):
            pipe.encode_prompt(prompt)
        assert [call[0] for call in pipe.calls] == ["a", "b", "c", "b"]

    def test_a_pipeline_that_encodes_nothing(self):
        pipe = Pipe()
        pipe.encode_prompt = None  # type: ignore[assignment, method-assign]
        Conditioning(pipe).release()
        assert pipe.encode_prompt is None


class TestParking:
    def test_on_the_cpu_nothing_moves(self):
        pipe = Pipe()
        Conditioning(pipe)
        pipe.encode_prompt("red")
        assert pipe.text_encoder.sent == []

    def test_on_a_gpu_they_are_there_while_they_encode(self):
        pipe = Pipe("cuda:0")
        Conditioning(pipe)
        assert pipe.text_encoder.sent == pipe.text_encoder_2.sent == ["cpu"]
        pipe.encode_prompt("red")
        assert pipe.calls[0][2] == ["cpu", "cuda:0"]
        assert pipe.text_encoder.sent == pipe.text_encoder_2.sent == ["cpu", "cuda:0", "cpu"]
        pipe.encode_prompt("red")
        pipe.encode_prompt(prompt_embeds=torch.zeros(1))
        assert len(pipe.text_encoder.sent) == 3
        assert pipe.vae.sent == []

    def test_they_go_back_after_an_error(self):
        pipe = Pipe("cuda:0")
        Conditioning(pipe)
        for _ in range(2):
            with pytest.raises(RuntimeError, match="planted"):
                pipe.encode_prompt("red", fails=True)
        assert pipe.text_encoder.sent[-1] == "cpu"
        assert len(pipe.calls) == 2

    def test_a_pipeline_spread_over_gpus_is_left_alone(self):
        pipe = Pipe("cuda:0")
        pipe.hf_device_map = {"text_encoder": 1}  # type: ignore[attr-defined]
        Conditioning(pipe)
        pipe.encode_prompt("red")
        assert pipe.text_encoder.sent == []

    def test_release(self):
        pipe = Pipe("cuda:0")
        wrap = Conditioning(pipe)
        wrap.release()
        assert pipe.text_encoder.sent[-1] == "cuda:0"
        pipe.encode_prompt("red")
        pipe.encode_prompt("red")
        assert len(pipe.calls) == 2


def test_inputs_of_a_real_pipeline_are_the_same_with_it():
    """Bit for bit, for the first sample of a pair of prompts and for the next."""
    plain, wrapped = build_pipeline(3, num_layers=1), build_pipeline(3, num_layers=1)
    Conditioning(wrapped, parks=True)
    task, sampler = MazeTask(mazes=2), Sampler(steps=2, guidance_scale=2.0)
    for sample in task.samples():
        expected, found = (task.inputs(pipe, sample, sampler).per_run for pipe in (plain, wrapped))
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected)
