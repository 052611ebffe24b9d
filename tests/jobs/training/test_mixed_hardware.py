"""Workers that round differently are told apart, and those that do not are not."""

import torch

from jobs.training.mixed_hardware import differences, hardware


def test_like_workers_have_no_differences() -> None:
    own = hardware(torch.device("cpu"))
    assert own["torch"] == torch.__version__
    assert own["threads"] == str(torch.get_num_threads())
    assert own["cpu"]
    assert differences([own, dict(own), hardware(torch.device("cpu"))]) == []
    assert differences([own]) == []


def test_each_difference_names_its_ranks() -> None:
    own = {"cpu": "A", "torch": "2.8", "threads": "1"}
    lines = differences([own, own | {"cpu": "B"}, own | {"threads": "4"}, own | {"gpu": "H100"}])
    assert lines == [
        "cpu: A (rank 0 2 3), B (rank 1)",
        "gpu: H100 (rank 3), none (rank 0 1 2)",
        "threads: 1 (rank 0 1 3), 4 (rank 2)",
    ]
