"""Any number for any parameter of any method: it is taken, or refused before work begins, in the words of the command line."""

from __future__ import annotations

import pytest

from zsq_deploy.calib.methods import METHODS
from zsq_deploy.errors import UsageError
from zsq_deploy.pipeline.checks import check_method
from zsq_deploy.recipe import Recipe

NUMBERS = [
    (method.name, name, default)
    for method in METHODS.values()
    for name, default in method.defaults.items()
    if isinstance(default, int | float) and not isinstance(default, bool)
]


def check(method: str, **parameters: object) -> None:
    check_method(
        Recipe.of({"model": {"source": "net.onnx"}, "calibration": {"method": method, "parameters": parameters}})
    )


def refusal(method: str, **parameters: object) -> UsageError | None:
    """How they are refused; any other error is let through, and fails the test."""
    try:
        check(method, **parameters)
    except UsageError as error:
        return error
    return None


@pytest.mark.parametrize(("method", "name", "default"), NUMBERS)
def test_numbers_are_taken_or_refused(method: str, name: str, default: float) -> None:
    check(method, **{name: default})
    kind = type(default)
    for value in (0, 1, -1, 10**5):
        said = refusal(method, **{name: kind(value)})
        assert said is None or (said.where == "--param" and name in str(said) and said.remedy)
    with pytest.raises(UsageError, match=name):
        check(method, **{name: kind(10**30)})


@pytest.mark.parametrize(
    ("method", "parameters", "words"),
    [
        ("genie", {"latent": 0}, "1 or more"),
        ("genie", {"upsamplings": 100}, "at most 10"),
        ("texq", {"generator_batch": 0}, "1 or more"),
        ("dsg", {"noise": 0}, "1 or more"),
        ("dsg", {"slack": 2.0}, "between 0 and 1"),
        ("kw", {"sigma": 0.0}, "above 0"),
        ("kw", {"sigma": 1e5}, "at most 100"),
        ("intraq", {"lower": 0.9}, "zsq methods show intraq"),
        ("hast", {"crop_area": 0.0}, "share of the area"),
        ("mixmix", {"box_least": 0.0}, "share"),
        ("deepinversion", {"jitter": 1e30}, "at most"),
    ],
)
def test_what_cannot_work_is_said_before_work_begins(method: str, parameters: dict[str, float], words: str) -> None:
    with pytest.raises(UsageError) as refused:
        check(method, **parameters)
    assert words in str(refused.value)
