# The parts of skl2onnx that this project calls have no types of their own.
from typing import Any

def __getattr__(name: str) -> Any: ...
