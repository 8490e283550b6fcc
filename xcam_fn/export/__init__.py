"""A network and its explanation in one file: a program, an ONNX graph, a page that runs it in the browser.

Methods are not written a second time here, but for what a graph cannot decide on its way.
"""

from xcam_fn.export.file import Exported, onnx, pt2
from xcam_fn.export.page import page, sample_images
from xcam_fn.export.program import METHODS_THAT_EXPORT, OUTPUTS, program

__all__ = ["METHODS_THAT_EXPORT", "OUTPUTS", "Exported", "onnx", "page", "program", "pt2", "sample_images"]
