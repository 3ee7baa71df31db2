"""The configuration: six layers, each value of which knows where it was written.

`load` reads the layers, checks each of them and merges them into a `Config`; `check` tells what is wrong with
files. Which sections there are, and what they take, the executors' registry says (`Sections`).
"""

from fractal_runner.config.final import Config, Row
from fractal_runner.config.keys import Section, Takes, takes
from fractal_runner.config.layers import LAYERS, PROJECT, LayerFile, check, layer_files, load
from fractal_runner.config.resources import RESOURCE_CLASS, UnitLayer, unit_layers
from fractal_runner.config.schema import EXECUTOR, RESERVED, SIZE, TIME, Sections
from fractal_runner.config.values import Mistake, Origin

__all__ = [
    "EXECUTOR",
    "LAYERS",
    "PROJECT",
    "RESERVED",
    "RESOURCE_CLASS",
    "SIZE",
    "TIME",
    "Config",
    "LayerFile",
    "Mistake",
    "Origin",
    "Row",
    "Section",
    "Sections",
    "Takes",
    "UnitLayer",
    "check",
    "layer_files",
    "load",
    "takes",
    "unit_layers",
]
