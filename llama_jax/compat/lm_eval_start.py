"""Makes the lm-eval harness know the model "llama-jax", as soon as it is imported.

The harness has no entry points for models of other packages. So this file is installed beside the package, too, as a
module of its own, and a .pth file imports it when Python starts. It therefore imports nothing that Python has not
imported by then, and does nothing until the harness is imported.
"""

import sys

HARNESS = "lm_eval.models"
NAMES = ("llama-jax", "llama_jax")
TARGET = "llama_jax.evaluate.harness:LlamaJax"


class Finder:
    """Finds the harness's list of models, and has ours added behind it."""

    def find_spec(self, name, path=None, target=None):  # type: ignore[no-untyped-def]
        """Return the spec of the harness's list of models. Of any other module: None."""
        if name != HARNESS:
            return None
        from importlib.util import find_spec

        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module):  # type: ignore[no-untyped-def]
                execute(module)
                register()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def register() -> None:
    """Add our model to the harness's, which imports it when it is asked for."""
    try:
        from lm_eval.api.registry import model_registry

        for name in NAMES:
            if name not in model_registry:
                model_registry.register(name, target=TARGET)
    except Exception as error:  # another version of the harness works without us
        print(f"llama-jax: not known to this version of lm_eval: {error}", file=sys.stderr)


if HARNESS in sys.modules:
    register()
else:
    sys.meta_path.insert(0, Finder())
