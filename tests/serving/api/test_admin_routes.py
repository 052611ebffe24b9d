"""What an operator's order may make the server read."""

import pytest

from serving.api.admin_routes import is_allowed


@pytest.mark.parametrize(
    ("reference", "allowed", "expected"),
    [
        ("/usr", [], True),
        ("latest", ["s3://bucket/runs"], True),
        ("s3://bucket/runs/a/checkpoints/step-1", ["s3://bucket/runs"], True),
        ("s3://bucket/runs-of-others/a", ["s3://bucket/runs"], False),
        ("s3://bucket/runs/../secret", ["s3://bucket/runs"], False),
        ("/usr", ["s3://bucket/runs", "/data"], False),
        ("/data/run/step-1", ["s3://bucket/runs", "/data/"], True),
        ("/data/../etc", ["/data"], False),
        ("hf://OWNER/NAME@main", ["hf://OWNER"], True),
        ("hf://OTHER/NAME@main", ["hf://OWNER"], False),
    ],
)
def test_a_checkpoint_lies_under_an_allowed_place(
    reference: str, allowed: list[str], *, expected: bool
) -> None:
    assert is_allowed(reference, allowed) is expected
