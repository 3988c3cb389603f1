"""The forms of requests and answers; FastAPI checks them, and writes them into the OpenAPI description."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, create_model

__all__ = ["Continuation", "Guess", "Guesses", "ModelCard", "Prompt", "Status", "faults", "pictures"]

LONGEST_PROMPT = 2_000
LONGEST_CONTINUATION = 64
SHOWN = 40  # characters of a wrong value in an error

Strict = ConfigDict(extra="forbid", strict=True)  # "0.5" is no number, and an unknown field is a misspelt one
Pixel = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Picture = Annotated[list[Pixel], Field(min_length=64, max_length=64)]


def pictures(largest: int) -> type[BaseModel]:
    """The request to a classifier: 1 to `largest` pictures of 64 pixels, each from 0 (white) to 1 (black)."""
    batch = Annotated[list[Picture], Field(min_length=1, max_length=largest)]
    return create_model("Pictures", __config__=Strict, pictures=(batch, ...))


class Prompt(BaseModel):
    """The request to a language model: text, and how many bytes to add to it."""

    model_config = Strict
    prompt: str = Field(min_length=1, max_length=LONGEST_PROMPT)
    length: int = Field(default=1, ge=1, le=LONGEST_CONTINUATION)


class _Signed(BaseModel):
    """Which model answered, and which replica: when one of them is wrong, this says where to look."""

    model: str
    version: str
    replica: str


class Guess(BaseModel):
    """One picture's answer: the most probable class, and the probability of each."""

    label: str
    probabilities: dict[str, float]


class Guesses(_Signed):
    """One guess a picture, in the pictures' order."""

    answers: list[Guess]


class Continuation(_Signed):
    """What follows the prompt, each byte the most probable one; and the five likeliest bytes behind the prompt."""

    continuation: str
    next: dict[str, float]


class ModelCard(_Signed):
    """What is served: the kind of model, and the SHA-256 of its file."""

    kind: str
    sha256: str


class Status(BaseModel):
    """Whether this worker lives, or is ready."""

    status: str
    replica: str


def faults(errors: list[dict[str, Any]]) -> str:
    """The first of pydantic's errors as a sentence: where it is, what was expected and what came; and how many more."""
    first = errors[0]
    where = ".".join(str(part) for part in first["loc"] if part != "body") or "the body"
    came = ascii(first.get("input"))  # ASCII, or a lone surrogate in the request would spoil the answer
    came = came if len(came) <= SHOWN else f"{came[:SHOWN]}..."
    more = f" ({len(errors) - 1} more faults)" if len(errors) > 1 else ""
    return f"{where}: {first['msg']}, got {came}{more}."
