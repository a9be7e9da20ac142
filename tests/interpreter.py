"""Triton's interpreter, made faster by a third for the tests: the same functions run, on the same numbers."""

from triton.runtime.interpreter import InterpretedFunction, _patch_lang


def look_once():
    """When a kernel is launched, and again at every call of one @triton.jit function by another, the interpreter looks
    through all of triton.language for what it has to replace. A call finds that the launch has replaced it, but for
    what only triton's own functions see, which stays replaced: looking once for each module is enough."""
    seen = set()

    def call(self, *args, **kwargs):
        if self.fn.__module__ not in seen:
            seen.add(self.fn.__module__)
            _patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    InterpretedFunction.__call__ = call
