"""Settings of a trial and of a study, checked before anything is trained or overwritten."""

from ablate.config.presets import PRESETS, Preset
from ablate.config.reading import load_study
from ablate.config.section import ConfigError, Section, digest, parse
from ablate.config.settings import Corpus, Dense, Mixture, Model, Questions, Train, Tree, Trial
from ablate.config.study import Budget, Contrast, Factor, Levels, Scalar, Study, Tune

__all__ = [
    "PRESETS",
    "Budget",
    "ConfigError",
    "Contrast",
    "Corpus",
    "Dense",
    "Factor",
    "Levels",
    "Mixture",
    "Model",
    "Preset",
    "Questions",
    "Scalar",
    "Section",
    "Study",
    "Train",
    "Tree",
    "Trial",
    "Tune",
    "digest",
    "load_study",
    "parse",
]
