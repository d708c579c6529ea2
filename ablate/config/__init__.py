"""Settings of a trial and of a study, checked before anything is trained or overwritten."""

from ablate.config.errors import ConfigError, echo, one_line, reason
from ablate.config.masking import mask_output, masked
from ablate.config.presets import PRESETS, Preset
from ablate.config.reading import load_study
from ablate.config.search import Finalists, Sampler
from ablate.config.section import Section, digest, parse
from ablate.config.settings import Corpus, Dense, Mixture, Model, Questions, Train, Tree, Trial
from ablate.config.study import NAME, Budget, Contrast, Factor, Levels, Scalar, Study, check_field, integer_field
from ablate.config.task import Task
from ablate.config.tune import Bracket, Tune

__all__ = [
    "NAME",
    "PRESETS",
    "Bracket",
    "Budget",
    "ConfigError",
    "Contrast",
    "Corpus",
    "Dense",
    "Factor",
    "Finalists",
    "Levels",
    "Mixture",
    "Model",
    "Preset",
    "Questions",
    "Sampler",
    "Scalar",
    "Section",
    "Study",
    "Task",
    "Train",
    "Tree",
    "Trial",
    "Tune",
    "check_field",
    "digest",
    "echo",
    "integer_field",
    "load_study",
    "mask_output",
    "masked",
    "one_line",
    "parse",
    "reason",
]
