"""The settings of estimators: keys of [weights] with their ranges. The descriptions are the rows of docs/settings.md."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from pipeline.marks.patterns import compile_pattern

Calibrated = Literal["calibrated"]
_SCALE = (
    "factor of the scores, before the clamp; `calibrated`: the factor with which they predict held-out labels best, at "
    "least 0, see [weights.md](weights.md#how-well-scores-predict-labels-that-they-have-not-seen)"
)
Scale = Annotated[Annotated[float, Field(gt=0)] | Calibrated, Field(description=_SCALE)]
_SPREAD = (
    "the scores are multiplied so that their standard deviation over all response tokens is this many nats, before the clamp; "
    "`none`: they are not"
)
Spread = Annotated[Annotated[float, Field(gt=0)] | Literal["none"], Field(description=_SPREAD)]
_FEATURES = (
    "what a token's reward depends on: its id, or its id and what was read before it, which needs `attribute.contexts`"
)
Features = Annotated[Literal["tokens", "contexts"], Field(description=_FEATURES)]
K = Annotated[float, Field(gt=0, description="factor of every weight")]
Mu = Annotated[float, Field(gt=0, description="+mu on chosen, -mu on rejected tokens")]
Lower = Annotated[float, Field(description="lower end L of the clamp on scores, in nats")]
Upper = Annotated[float, Field(description="upper end U of the clamp, in nats")]
Seed = Annotated[int, Field(ge=0, description="seed of the random numbers")]
MinWeight = Annotated[float, Field(ge=0, description="smallest weight")]
MaxWeight = Annotated[float, Field(gt=0, description="largest weight")]
_SHARE = "share of each response's tokens to select, rounded down, at least one; of equal scores the earlier token"
Share = Annotated[float, Field(gt=0, le=1, description=_SHARE)]
TiLambda = Annotated[float, Field(ge=0, le=1, description="share of the attribution, 0 to 1; the rest is the prior")]
_SIGMA = "the prior's sigma is the span's length divided by this; 4 in the paper, 8 in the release"
SigmaDivisor = Annotated[float, Field(gt=0, description=_SIGMA)]
_SPAN = (
    "over which tokens the weights have mean 1; `sequence`: prompt and response, as in the release, needs `attribute.prompts`, "
    "and the mean over the response is then not 1"
)
Span = Annotated[Literal["response", "sequence"], Field(description=_SPAN)]
DecayGamma = Annotated[float, Field(gt=0, le=1, description="factor per token, the first included")]
_REWARD = "weight per nat of log π+ − log ref: alpha times the beta of the DPO model. TGDPO's release has 0.5 times 0.1"
RewardFactor = Annotated[float, Field(gt=0, description=_REWARD)]
CriticalBeta = Annotated[float, Field(ge=0, description="how much p− counts against p+; 1 in cDPO's release")]
_PER = (
    "what a number of the columns `dataset.chosen_weights_column` and `dataset.rejected_weights_column` stands for: a token, a "
    "character of the response's text, or a message of the response"
)
Per = Annotated[Literal["token", "character", "message"], Field(description=_PER)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Rest = Annotated[Weight, Field(description="weight of the characters that nothing marks")]
DiffGamma = Annotated[Weight, Field(description="weight of the tokens that are not in the other response")]


def _is_pattern(text: str) -> str:
    compile_pattern(text)
    return text


_PATTERNS = (
    "regular expressions over the text of a response, each with a weight, such as `[['@code', 2], ['(?i)sorry', 0.5]]`; the "
    "last one that matches a character counts, see [weights.md](weights.md#patterns)"
)
Pattern = tuple[Annotated[str, AfterValidator(_is_pattern)], Weight]
Patterns = Annotated[tuple[Pattern, ...], Field(description=_PATTERNS)]


def _each_role_once(roles: tuple[tuple[str, float], ...]) -> tuple[tuple[str, float], ...]:
    if len(dict(roles)) < len(roles):
        raise ValueError("expected each role once")
    return roles


_ROLES = (
    "weights of the messages of a response by their role, such as `[['tool', 0]]`; a pattern that matches counts more, see "
    "[weights.md](weights.md#patterns)"
)
Role = tuple[Literal["assistant", "tool"], Weight]
Roles = Annotated[tuple[Role, ...], AfterValidator(_each_role_once), Field(description=_ROLES)]
