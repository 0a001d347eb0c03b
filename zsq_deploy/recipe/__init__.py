"""The recipe: everything that one run of the main job is told, as a YAML file.

The words are those of the command line, grouped: ``--min-agreement`` is ``verification.gates.min_agreement``. An unknown word is
an error, with its line and the word that was probably meant. Relative paths count from the folder of the recipe file, so that a
recipe and its files can be moved together. A run writes ``recipe.resolved.yaml`` beside its results: the recipe with every
default filled in and every path absolute, which gives the same result when it is run again.
"""

from zsq_deploy.recipe.quantization import NncfSection, PotSection, QuantizationSection
from zsq_deploy.recipe.recipe import Recipe, describe
from zsq_deploy.recipe.sections import CalibrationSection, GatesSection, ModelSection, RunSection, VerificationSection
from zsq_deploy.recipe.values import parse_shape
from zsq_deploy.recipe.words import FieldDescription

__all__ = [
    "CalibrationSection",
    "FieldDescription",
    "GatesSection",
    "ModelSection",
    "NncfSection",
    "PotSection",
    "QuantizationSection",
    "Recipe",
    "RunSection",
    "VerificationSection",
    "describe",
    "parse_shape",
]
