# The compiled module (src/bind_*.cpp); its signatures are in its docstrings.
from typing import Any

def __getattr__(name: str) -> Any: ...
