"""Arguments written as text, with the forms seen in real configs."""

import pytest

from library.errors import ConfigError
from library.optim.plugins import parse_arguments


@pytest.mark.parametrize(
    ("text", "value", "noticed"),
    [
        ("weight_decay=0.01", 0.01, False),
        ("betas=0.9,0.99", (0.9, 0.99), False),
        ("betas=(0.9, 0.999)", (0.9, 0.999), False),
        ("betas=[0.9,0.99]", (0.9, 0.99), False),
        ("betas = 0.9, 0.95", (0.9, 0.95), False),
        ("decouple=True", True, False),
        ("beta3=None", None, False),
        ("relative_step=False,", False, True),
        ("warmup_init=true", True, True),
        ("weight_decay=0.1,", 0.1, True),
        ("beta3=none", None, True),
        ("mode='min'", "min", False),
        ("mode=min", "min", True),
        ("step_rules=1:10,0.1:20,0.01", "1:10,0.1:20,0.01", True),
        ("note='a=b'", "a=b", False),
        ("eps=1e-8", 1e-8, False),
        ("steps=-1", -1, False),
    ],
)
def test_values(text, value, noticed):
    parsed = parse_arguments([text], option="optimizer_args")
    (got,) = parsed.values.values()
    assert got == value
    assert type(got) is type(value)
    assert bool(parsed.notices) is noticed


@pytest.mark.parametrize("text", ["warmup_steps", "50", "=1", "a b=1", "betas=(0.9", "x=a b", "x="])
def test_what_cannot_be_read_is_refused_with_its_text(text):
    with pytest.raises(ConfigError, match="lr_scheduler_args") as caught:
        parse_arguments([text], option="lr_scheduler_args")
    assert text in str(caught.value)


def test_the_last_of_a_repeated_key_counts_and_is_reported():
    parsed = parse_arguments(["eps=1", "eps=2"], option="optimizer_args")
    assert parsed.values == {"eps": 2}
    assert "more than once" in parsed.notices[0]
