"""mechmem: mechanistic interpretability of memorisation.

Importing it loads nothing: each name of `__init__.pyi` is loaded when it is first used.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__version__ = "0.2.0"
